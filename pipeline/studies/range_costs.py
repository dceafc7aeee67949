"""Says what the ranges of int8 cost models with gated networks and RMSNorm, with and without
outliers.

    python -m bertile.studies.range_costs -o DIR

trains a small ModernBERT, Nomic BERT and Qwen3 from nothing to tell the section of a Debian package
from its description, and compiles each in float32 and in int8 with every kind of range.

Models as small as these grow no outliers of their own. So each is compiled with some that are
planted too, which leave what it computes as it was: a few channels of a norm, or of the gated
product, are FACTOR times as large, and the weights that read them as much smaller.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bertile import driver
from bertile.base import scratch
from bertile.base.errors import ModelError, NumericMismatchError, require
from bertile.base.progress import Progress
from bertile.base.quiet import quiet
from bertile.base.tables import table
from bertile.bench import pages
from bertile.cli.config_flags import cache_directory
from bertile.compress import sections
from bertile.compress import train as training
from bertile.compress.sections import Split
from bertile.config import Config
from bertile.evaluation import datasets
from bertile.evaluation.datasets import Dataset
from bertile.export import cached, synthetic
from bertile.graph import importer, order
from bertile.graph.graph import Graph
from bertile.quantize import calibration
from bertile.quantize.observer import observe
from bertile.quantize.quantizer import input_kinds
from bertile.targets import rows as targets

EPOCHS = 3
RATE = 1e-3  # from nothing, more than what is trained already takes
WORDS = 4000  # of the vocabulary
CALIBRATION = 400  # texts, of those that are trained on
OUTLIERS = 3  # channels
FACTOR = 30.0
SAME = 1e-3  # of the largest logit: how far a planted model may be from its own, in float32

_SIZES = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3}
_SIZES |= {"intermediate_size": 192, "max_position_embeddings": 128}
# title: (synthetic model of the type, more of its configuration)
MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ModernBERT": (
        "modernbert-tiny",
        {"local_attention": 16, "classifier_pooling": "mean"},
    ),
    "Nomic BERT": ("nomic-bert-tiny", {}),
    "Qwen3": ("qwen3-tiny", {"num_key_value_heads": 1, "head_dim": 32}),
}
RANGES: Mapping[str, Mapping[str, Any]] = {
    "dynamic": {},
    "dynamic, smoothed": {"smooth": 0.5},
    "static": {"ranges": "mse"},
    "static, smoothed": {"ranges": "mse", "smooth": 0.5},
}
KINDS = ("norm", "attention", "gated product")  # what gives a layer its input, of those shown

Cost = tuple[float, float, float]
# The module that writes channels, the first of those that may be planted, and who reads them.
Place = tuple[Any, int, Sequence[Any]]


@dataclass(frozen=True)
class Row:
    """A model's costs: `outliers` by kind of input is the largest |x| over the median of a layer.

    `costs`: by RANGES (and "fp32") the accuracy, and the median and the least cosine of the texts'
    logits to float32's; None where the compile's check refuses the bundle.
    """

    model: str
    planted: str
    outliers: Mapping[str, float]
    costs: Mapping[str, Cost | None]


def study(
    directory: Path,
    examples: Split,
    config: Config,
    progress: Progress,
    epochs: int = EPOCHS,
    models: Sequence[str] = tuple(MODELS),
) -> Iterator[Row]:
    """A row for each model as it was trained, and for each place that outliers are planted in.

    What is trained stays in `directory`, and is not trained again. Raises ModelError where planting
    changes what a model computes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    sections.write(directory / "test.tsv", examples.test)
    dataset = datasets.read(directory / "test.tsv")
    calibrate = directory / "calibrate.txt"
    texts = [text for text, _ in examples.train[:CALIBRATION]]
    calibrate.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    for title in models:
        plain: np.ndarray | None = None
        model, tokenizer = trained(title, directory, examples, progress, epochs)
        for planted, places in PLANTS.items():
            planted_model = copy.deepcopy(model)
            if not plant(planted_model, places) and places is not nowhere:
                continue  # a model without such places
            place = _place(directory, title, planted)
            training.write(place, planted_model, tokenizer)
            row, logits = measured(title, planted, place, dataset, calibrate, config, progress)
            plain = logits if plain is None else plain
            if np.abs(logits - plain).max() > SAME * np.abs(plain).max():
                raise ModelError(f"outliers in the {planted} change what {title} computes")
            yield row


def trained(
    title: str, directory: Path, examples: Split, progress: Progress, epochs: int = EPOCHS
) -> tuple[Any, Any]:
    """The model and its tokenizer, out of a directory of an earlier run where there is one."""
    model, tokenizer = untrained(title, examples)
    place = _place(directory, title, "trained")
    if (place / "config.json").exists():
        with quiet():
            return type(model).from_pretrained(place, local_files_only=True), tokenizer
    score = training.fit(model, tokenizer, examples, progress, epochs, RATE)
    progress.say(f"{title}: accuracy {score:.4f} of torch's model")
    training.write(place, model, tokenizer)
    return model, tokenizer


def _place(directory: Path, *words: str) -> Path:
    return directory / "-".join(words).replace(" ", "-").lower()


def untrained(title: str, examples: Split) -> tuple[Any, Any]:
    """A row of MODELS with random weights, and a tokenizer of the words that are trained on; the
    same on every call.
    """
    torch, transformers = require("export", "torch", "transformers")
    (tokenizers,) = require("run", "tokenizers")
    words = tokenizers.BertWordPieceTokenizer()
    texts = [text for text, _ in examples.train]
    words.train_from_iterator(texts, vocab_size=WORDS, show_progress=False)
    name, more = MODELS[title]
    model_type, _ = synthetic.SYNTHETIC[name]
    ids = {name: words.token_to_id(f"[{name.upper()}]") for name in ("pad", "cls", "sep")}
    ends = (("[SEP]", ids["sep"]), ("[CLS]", ids["cls"]))
    words.post_processor = tokenizers.processors.BertProcessing(*ends)
    names = dict(enumerate(examples.labels))
    settings = {f"{name}_token_id": place for name, place in ids.items()}
    settings |= {"vocab_size": words.get_vocab_size(), "id2label": names, **_SIZES, **more}
    settings["label2id"] = {label: index for index, label in names.items()}
    with quiet():
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=words._tokenizer,
            **{f"{name}_token": f"[{name.upper()}]" for name in (*ids, "unk", "mask")},
        )
        model_config = transformers.AutoConfig.for_model(model_type, **settings)
        torch.manual_seed(training.SEED)
        model = transformers.AutoModelForSequenceClassification.from_config(model_config)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return model, tokenizer


def norms(model: Any) -> Iterator[Place]:
    """The norms whose output nothing reads but the layers behind: those of pre-norm models."""
    for layer in model.base_model.layers:
        if hasattr(layer, "attn_norm"):
            if hasattr(layer.attn_norm, "weight"):  # the first layer has none
                yield layer.attn_norm, 0, [layer.attn.Wqkv]
            yield layer.mlp_norm, 0, [layer.mlp.Wi]
        elif hasattr(layer, "input_layernorm"):
            heads = layer.self_attn
            yield layer.input_layernorm, 0, [heads.q_proj, heads.k_proj, heads.v_proj]
            yield layer.post_attention_layernorm, 0, [layer.mlp.gate_proj, layer.mlp.up_proj]


def gated_products(model: Any) -> Iterator[Place]:
    """The factor of each gated product that has no activation."""
    for layer in model.base_model.layers:
        if hasattr(layer.mlp, "Wi"):
            yield layer.mlp.Wi, model.config.intermediate_size, [layer.mlp.Wo]
        else:
            yield layer.mlp.up_proj, 0, [layer.mlp.down_proj]


def nowhere(model: Any) -> Iterator[Place]:
    """No places: the model as it was trained."""
    return iter(())


PLANTS: Mapping[str, Callable[[Any], Iterator[Place]]] = {
    "none": nowhere,
    "norm": norms,
    "gated product": gated_products,
}


def plant(model: Any, places: Callable[[Any], Iterator[Place]]) -> int:
    """Make some channels of each place FACTOR times as large, in place, and what reads them
    as much smaller; gives how many places there are.
    """
    (torch,) = require("export", "torch")
    count = 0
    with torch.no_grad():
        for count, (writer, first, readers) in enumerate(places(model), 1):
            width = readers[0].weight.shape[1]
            channels = np.random.default_rng(count).permutation(width)[:OUTLIERS]
            for parameter in (writer.weight, getattr(writer, "bias", None)):
                if parameter is not None:
                    parameter[first + channels] *= FACTOR
            for reader in readers:
                reader.weight[:, channels] /= FACTOR
    return count


def measured(
    title: str,
    planted: str,
    place: Path,
    dataset: Dataset,
    calibrate: Path,
    config: Config,
    progress: Progress,
) -> tuple[Row, np.ndarray]:
    """The row of the model in `place`, and its logits (texts, labels) in float32."""
    settings: dict[str, dict[str, Any]] = {"fp32": {}}
    for name, fields in RANGES.items():
        fitted = {"calibrate": str(calibrate)} if fields else {}
        settings[name] = {"precision": "int8", **fitted, **fields}
    exported = cached.export_cached(str(place), config, progress)
    costs: dict[str, Cost | None] = {}
    reference = np.zeros(0)
    for name, fields in settings.items():
        with scratch.directory() as bundle:
            path = Path(bundle, "bundle")
            try:
                driver.compile(str(place), path, config, progress, **fields)
            except NumericMismatchError as error:  # too far from float32: so its user learns too
                progress.say(f"{title}, {planted}, {name}: {error}")
                costs[name] = None
                continue
            logits = datasets.answers(path, dataset, config.threads)
        reference = logits if name == "fp32" else reference
        metrics = dataset.metrics(logits, reference, exported.labels)
        cosines = _cosines(logits, reference)
        costs[name] = (metrics["accuracy"], float(np.median(cosines)), float(cosines.min()))
    graph = order.optimize(importer.import_onnx(exported))
    seen = outliers(graph, calibration.read_requests(calibrate, exported), config)
    return Row(title, planted, seen, costs), reference


def outliers(
    graph: Graph, requests: Sequence[Mapping[str, np.ndarray]], config: Config
) -> dict[str, float]:
    """By kind of input, the largest |x| over the median |x| of a layer that has the most of it."""
    row = targets.resolve(config.target, config.threads)
    kinds = input_kinds(graph)
    ratios: dict[str, float] = {}
    for name, observation in observe(graph, requests, row).items():
        ratio = float(observation.channels.max() / np.median(np.abs(observation.rows)))
        for kind in kinds[name]:
            ratios[kind] = max(ratio, ratios.get(kind, 0.0))
    return ratios


def as_text(rows: Sequence[Row], markdown: bool = False) -> str:
    """The table of outliers, and that of costs: accuracy, median and least cosine."""
    seen = [
        (row.model, row.planted, *(round(row.outliers[kind]) for kind in KINDS)) for row in rows
    ]
    lines = [
        (
            row.model,
            row.planted,
            _cell(row.costs["fp32"]).partition(",")[0],
            *(_cell(row.costs[name]) for name in RANGES),
        )
        for row in rows
    ]
    return "\n\n".join(
        (
            table(("model", "planted", *KINDS), seen, markdown),
            table(("model", "planted", "fp32", *RANGES), lines, markdown),
        )
    )


def _cell(cost: Cost | None) -> str:
    return "refused" if cost is None else f"{100 * cost[0]:.2f}%, {cost[1]:.4f}, {cost[2]:.3f}"


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, compile, and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m bertile.studies.range_costs")
    add = parser.add_argument
    add("-o", "--output", metavar="DIR", required=True, help="where what is trained stays")
    add("--epochs", metavar="N", type=int, default=EPOCHS, help=f"default: {EPOCHS}")
    add("--threads", metavar="N", type=int, default=1, help="default: 1")
    add(
        "--into",
        metavar="FILE[#NAME]",
        type=pages.argument("range-costs"),
        help="put the tables at <!-- range-costs --> of a page",
    )
    options = parser.parse_args(arguments)
    (torch,) = require("export", "torch")
    torch.set_num_threads(options.threads)
    config = Config(threads=options.threads, cache_dir=cache_directory(None))
    place, progress = Path(options.output), Progress()
    rows: list[Row] = []
    for row in study(place, sections.split(), config, progress, options.epochs):
        rows.append(row)
        if options.into:  # each time: who ends it in the middle keeps what was measured
            text = as_text(rows, markdown=True)
            pages.write(options.into, "range-costs", text)
    print(as_text(rows))


if __name__ == "__main__":
    main()
