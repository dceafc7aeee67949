"""Exports a model to a canonical ONNX file, checks it against torch, and copies its tokenizer."""

from __future__ import annotations

import ast
import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bertile.base import quiet
from bertile.base.errors import ModelError, NumericMismatchError, UsageError, require
from bertile.base.progress import Bar, open_bar
from bertile.config import Config
from bertile.export import asked, checkpoints, files, learned_ranges
from bertile.export.foreign import explained, ordinary
from bertile.families import model_config, table, text_settings
from bertile.families.text_settings import TextSettings
from bertile.loader import SIDES
from bertile.onnx import reach, tokenizer_file
from bertile.onnx.exported import ExportedModel, InputSpec, read
from bertile.onnx.samples import largest_difference, run_onnx, sample, session
from bertile.onnx.scores import room

__all__ = ["ExportedModel", "InputSpec", "export", "fingerprint", "read"]

OPSET = 20
_SCOPES = "pkg.torch.onnx.name_scopes"  # what torch's exporter records of a node
LONGEST = 2048  # tokens that it is compared with torch on
LONG = 512  # tokens that a model is compared on too of which no row tells how it counts
TOLERANCE = 1e-3  # largest absolute difference between ONNX Runtime and torch, real tokens only

_OUTPUTS = {
    "encoder": ("last_hidden_state",),
    "embedding": ("sentence_embedding",),
    "sequence-classification": ("logits",),
    "token-classification": ("logits",),
    "question-answering": ("start_logits", "end_logits"),
    "masked-lm": ("logits",),
    "next-sentence": ("logits",),
    "multiple-choice": ("logits",),
    "causal-lm": ("logits",),
    "pretraining": (),  # all that the model gives
}
# What transformers gives of each layer, one output each.
LAYERS = ("hidden_states", "attentions")


def export(model: Any, directory: Path, config: Config) -> ExportedModel:
    """Write MODEL as `directory`/model.onnx with its tokenizer files and export.json.

    MODEL is what `checkpoints.load` takes, an .onnx file, which goes to the normalizer, or what an
    earlier export wrote, which is copied. Raises
    ModelError or UsageError for what cannot be exported, NumericMismatchError if ONNX Runtime
    and torch differ by more than TOLERANCE on a real token.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if files.is_exported(model):
        return _copied(Path(model), directory, config)
    if files.is_onnx(model):
        from bertile.onnx import normalizer

        return normalizer.normalize(Path(model), directory, config)
    with open_bar("export", 5) as bar:
        return _export(model, directory, config, bar)


def _export(model: Any, directory: Path, config: Config, bar: Bar) -> ExportedModel:
    bar.advance(0, "load the weights")
    allowed = (config.allow_unused, config.trust_remote_code)
    checkpoint = checkpoints.load(model, config.head, *allowed, config.labels)
    if config.exit_threshold is not None:
        checkpoint = _with_early_heads(checkpoint, model)
    bar.advance(note="run it in torch")
    family = table.named(checkpoint.family)
    failure = explained(f"'{checkpoint.source}' cannot be exported", family.hindrance)
    with failure, quiet.quiet(), ordinary():
        exported = dataclasses.replace(
            _describe(checkpoint, directory), text=_prepare_texts(checkpoint, directory)
        )
        # before anything of the model is changed
        learned = learned_ranges.fix(checkpoint.model, checkpoint.ranges, checkpoint.source)
        exported, want = _answers(checkpoint, exported, _asked_layers(config))
        exported = _with_exits(exported, checkpoint)
        module = _module(checkpoint, exported)
        module.additive = family.own and _takes_additive(module, exported)
        _must_answer_alike(module, want, exported)
        bar.advance(note="torch's exporter writes the graph")
        exported, notes = _write_onnx(module, exported)
        bar.advance(note="compare with torch")
        difference = _check(module, exported, _padding_id(checkpoint))
        bar.advance(note="look which outputs depend on other rows")
        seen = reach.look(session(exported.onnx_path), exported.inputs, None, None)
        bar.advance()
    if not family.own:
        notes = (f"{checkpoint.family} has no row of its own: it went the general road", *notes)
    note = f"ONNX Runtime and torch differ by at most {difference:.2g} on real tokens"
    notes = (*exported.notes, *learned, *module.notes, *notes, *seen.notes(), note)
    known = {"notes": notes, "together": bool(seen.rows), "padded": bool(seen.padding)}
    return dataclasses.replace(exported, **known).write()


def fingerprint(model: Any, config: Config) -> str:
    """Return a hex SHA-256 of everything that `export` depends on, for a cache key."""
    return files.fingerprint(model, config.head, config.tokenizer)


def _copied(source: Path, directory: Path, config: Config) -> ExportedModel:
    """What an earlier export wrote, under its own name: who changes it, changes the model."""
    exported = read(source)
    asked.must_agree(exported, source, config.head)
    for path in files.exported_files(source):
        shutil.copyfile(path, directory / path.name)
    own = {"directory": directory, "source": str(source), "sha256": files.fingerprint(source)}
    text = tokenizer_file.prepare(directory, exported.text, str(source))  # older versions did not
    return dataclasses.replace(exported, text=text, **own).write()


def _describe(checkpoint: checkpoints.Checkpoint, directory: Path) -> ExportedModel:
    outputs = _OUTPUTS[checkpoint.head]
    if checkpoint.chain is not None:
        outputs = checkpoint.chain.outputs
    if checkpoint.head == "encoder" and getattr(checkpoint.model, "pooler", None) is not None:
        outputs = (*outputs, "pooler_output")
    family = table.named(checkpoint.family)
    inputs = [InputSpec("input_ids", below=_vocabulary(checkpoint.model))]
    if "attention_mask" in family.takes(checkpoint.model):
        inputs.append(InputSpec("attention_mask", below=2, default="ones"))
    types = family.type_count(checkpoint.model)
    if types > 1:  # a single one is a constant
        inputs.append(InputSpec("token_type_ids", below=types, default="zeros"))
    if most := family.box_count(checkpoint.model):
        inputs += [InputSpec(side, below=most, default="zeros") for side in SIDES]
    return ExportedModel(
        directory=directory,
        source=checkpoint.source,
        sha256=checkpoint.sha256,
        family=checkpoint.family,
        head=checkpoint.head,
        max_length=family.max_length(checkpoint.model),
        inputs=tuple(inputs),
        outputs=outputs,
        labels=checkpoint.labels,
        notes=checkpoint.notes,
    )


def _with_early_heads(checkpoint: checkpoints.Checkpoint, model: Any) -> checkpoints.Checkpoint:
    from bertile.export import early_heads  # imports torch, which only this stage needs

    if checkpoint.head != "sequence-classification":
        raise UsageError(
            f"--exit-threshold is for texts that are classified, not for the head"
            f" '{checkpoint.head}'",
            "leave it out, or compile the model with its own head",
        )
    kind = getattr(checkpoint.model.config, "problem_type", None)
    if len(checkpoint.labels) < 2 or kind == "multi_label_classification":
        raise UsageError(
            f"--exit-threshold is for labels of which one is right, which '{checkpoint.source}' has"
            " not",
            "leave it out",
        )
    family, directory = table.named(checkpoint.family), files.find_directory(str(model))
    return dataclasses.replace(
        checkpoint, exits=early_heads.read(checkpoint.model, family, directory)
    )


def _with_exits(exported: ExportedModel, checkpoint: checkpoints.Checkpoint) -> ExportedModel:
    """The same with the outputs of early heads, where there are such."""
    if checkpoint.exits is None:
        return exported
    layers = [head.layers for head in checkpoint.exits]
    exits = (*layers, checkpoint.model.config.num_hidden_layers)
    exported = dataclasses.replace(exported, exits=exits)
    outputs = (*exported.outputs, *exported.early_outputs)
    return dataclasses.replace(exported, outputs=outputs)


def _vocabulary(model: Any) -> int | None:
    """How many ids a model has; None where it looks none up."""
    try:
        rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:  # of characters, which are hashed
        return None
    return rows or getattr(model.config, "vocab_size", None)


def _padding_id(checkpoint: checkpoints.Checkpoint) -> int:
    counted_from = table.named(checkpoint.family).padding_id(checkpoint.model)
    return counted_from or model_config.padding_id(checkpoint.model.config.to_dict())


def _module(checkpoint: checkpoints.Checkpoint, exported: ExportedModel) -> Any:
    from bertile.export.torch_module import Exportable  # imports torch, which only this stage needs

    return Exportable(checkpoint, tuple(spec.name for spec in exported.inputs), exported.outputs)


def _arguments(exported: ExportedModel) -> dict[str, Any]:
    """Tensors to export with: of sizes 2 and 16, because torch makes a constant of an axis of 1."""
    (torch,) = require("export", "torch")
    arrays = sample(exported.inputs, batch=2, length=_at_most(16, exported), padding_id=0)
    return {spec.name: torch.from_numpy(arrays[spec.name]) for spec in exported.inputs}


def _at_most(length: int, exported: ExportedModel) -> int:
    return min(length, exported.max_length or length)


def _mask(arguments: Mapping[str, Any]) -> np.ndarray:
    """Which tokens are real; all of a model that takes no mask."""
    ids = arguments["input_ids"]
    return arguments["attention_mask"].numpy() if "attention_mask" in arguments else ids.numpy() | 1


def _asked_layers(config: Config) -> tuple[str, ...]:
    return tuple(name for name in LAYERS if getattr(config, f"output_{name}"))


def _answers(
    checkpoint: checkpoints.Checkpoint, exported: ExportedModel, layers: tuple[str, ...]
) -> tuple[ExportedModel, Mapping[str, Any]]:
    """What the model answers as its users call it, by name, {} where that is pooled first; with the
    outputs that it tells.
    """
    if checkpoint.chain is not None:
        if layers:
            raise UsageError(
                f"an embedding has no {' and no '.join(layers)}",
                "compile the model with --head encoder",
            )
        return exported, {}
    from bertile.export.torch_module import flat, with_boxes

    asked = {f"output_{name}": True for name in layers}
    results = flat(checkpoint.model(**with_boxes(_arguments(exported)), **asked))
    outputs = exported.outputs or tuple(
        name for name, value in results.items() if value.is_floating_point() and "." not in name
    )
    if checkpoint.head == "encoder" and not table.named(checkpoint.family).own:
        known = ("last_hidden_state", "pooler_output")
        outputs = tuple(name for name in known if name in results) or outputs
    for name in layers:
        of_layers = [output for output in results if output.startswith(f"{name}.")]
        outputs = (*outputs, *(of_layers or (name,)))
    absent = [name for name in outputs if name not in results]
    if absent:
        raise ModelError(
            f"a {type(checkpoint.model).__name__} answers with {', '.join(results)}, not with"
            f" {', '.join(absent)}",
            "compile another --head of it",
        )
    exported = dataclasses.replace(exported, outputs=outputs)
    return exported, {name: results[name].numpy() for name in outputs}


def _takes_additive(module: Any, exported: ExportedModel) -> bool:
    """Whether the model takes a mask to add, of (batch, 1, 1, length), as it is.

    Tried, since what makes of (batch, length) what is wanted moved between transformers' releases,
    family by family. Code that is not transformers' is held to it (`_must_answer_alike`).
    """
    if not type(module.model).__module__.startswith("transformers."):
        return True
    if _sees_windows(module.model.config):  # which such a mask would open
        return False
    arguments = _arguments(exported)
    mask = arguments["attention_mask"].numpy()
    try:
        got = module(**arguments)
    except Exception:  # whatever a mask of two axes too many makes its code raise
        return False
    module.additive = False
    try:
        want = module(**arguments)
    except Exception:  # its forward is ours, and takes no other
        return True
    return all(
        mine.shape == theirs.shape
        and largest_difference(mine.numpy(), theirs.numpy(), mask) <= TOLERANCE
        for mine, theirs in zip(got, want, strict=True)
    )


def _sees_windows(config: Any) -> bool:
    """Whether some layers see a part of the sequence, so that the model builds a mask for each
    kind.
    """
    kinds = getattr(config, "layer_types", None) or ()
    return any(kind != "full_attention" for kind in kinds)


def _beyond_windows(config: Any) -> tuple[int, ...]:
    """The length in which the windows of a model's layers show; () for one without."""
    window = getattr(config, "sliding_window", None) or getattr(config, "local_attention", None)
    return (min(2 * window + 5, LONGEST),) if window else ()


def _must_answer_alike(module: Any, want: Mapping[str, Any], exported: ExportedModel) -> None:
    """Refuse a model whose own code makes something else of the mask that the export gives it."""
    arguments = _arguments(exported)
    got = dict(zip(exported.outputs, module(**arguments)))
    mask = _mask(arguments)
    for name, array in want.items():
        worst = largest_difference(got[name].numpy(), array, mask)
        if not worst <= TOLERANCE:
            raise ModelError(
                f"'{exported.source}' cannot be exported: its {name} differs by {worst:.3g} where"
                " the attention mask is added to the scores, as eager attention does",
                "its code must take a mask of (batch, 1, 1, length)",
            )


def _write_onnx(module: Any, exported: ExportedModel) -> tuple[ExportedModel, tuple[str, ...]]:
    """Write model.onnx in canonical form; give what is known of it since, and notes for people."""
    (torch,) = require("export", "torch")
    batch = torch.export.Dim("batch", min=1)
    length = torch.export.Dim("length", min=1, max=exported.max_length)
    arguments = _arguments(exported)
    program = torch.onnx.export(
        module,
        (),
        kwargs=arguments,
        dynamo=True,
        opset_version=OPSET,
        input_names=list(arguments),
        output_names=list(exported.outputs),
        dynamic_shapes={name: {0: batch, 1: length} for name in arguments},
        verbose=False,
    )
    return _write_canonical(program.model_proto, exported, module.additive)


def _write_canonical(
    proto: Any, exported: ExportedModel, additive: bool
) -> tuple[ExportedModel, tuple[str, ...]]:
    """Drop the exporter's records of source lines, and bring the rest to the one spelling."""
    from bertile.onnx import attention, normalizer, places, rewrites
    from bertile.onnx.graph import OnnxGraph, save

    graph, notes = OnnxGraph(proto), ()
    sizes = {value.name: _sizes(value) for value in [*graph.inputs, *proto.graph.value_info]}
    _name_products(graph)
    for node in graph.nodes:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in [*graph.inputs, *graph.results]:
        del value.metadata_props[:]
    rewrites.split_gemms(graph)
    angles = any(node.op_type in places.ANGLES for node in graph.nodes)
    if not table.named(exported.family).own:
        limit, notes = normalizer.brought(graph, exported.inputs, OPSET, exported.max_length)
        exported = dataclasses.replace(exported, max_length=limit)
    elif angles or not additive:
        notes = _rewrite(graph, exported)
    rewrites.write_gathers(graph)
    rewrites.pick_from_stacks(graph, sizes.get)
    rewrites.write_reshapes(graph, sizes.get)
    rewrites.transpose_weights(graph)
    attention.scale_scores(graph)
    rewrites.name_weights(graph)
    graph.clean()
    save(graph.to_model(OPSET), exported.onnx_path)
    return exported, notes


def _rewrite(graph: Any, exported: ExportedModel) -> tuple[str, ...]:
    """Bring what the model itself makes of shapes and (batch, length), masks and the angles of
    places, to canonical form, as an ONNX file's.
    """
    from bertile.onnx import normalizer, probing

    limit = exported.max_length
    longest = max(length for _, length in probing.SHAPES)
    length = limit if limit is not None and limit < longest else None
    probes = probing.probe(graph, exported.inputs, OPSET, None, length)
    _, notes = normalizer.rewrite(graph, probes, OPSET, limit)
    return notes


def _name_products(graph: Any) -> None:
    """Call the weight of a product without a bias, by which it would be named, as its layer.

    torch's exporter numbers what it has transposed, and records whose layer a node is.
    """
    names: dict[str, str] = {}
    consumers = graph.consumers()
    for node in graph.nodes:
        scopes = next((p.value for p in node.metadata_props if p.key == _SCOPES), None)
        if node.op_type != "MatMul" or scopes is None or not graph.is_constant(node.input[1]):
            continue
        readers = consumers.get(node.output[0], [])
        if not any(r.op_type == "Add" and any(map(graph.is_constant, r.input)) for r in readers):
            names.setdefault(node.input[1], f"{ast.literal_eval(scopes)[-2]}.weight")
    for old, new in names.items():
        if not graph.is_constant(new) and list(names.values()).count(new) == 1:
            graph.rename_constant(old, new)


def _sizes(value: Any) -> list[object]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def _check(module: Any, exported: ExportedModel, padding_id: int) -> float:
    """Return the largest difference between torch and ONNX Runtime over some padded batches."""
    (torch,) = require("export", "torch")
    worst = 0.0
    lengths = (16, 37, *_beyond_windows(module.model.config))
    if not table.named(exported.family).own:  # whose code may branch by the length
        lengths = (*lengths, LONG)
    shapes = [(2 + place, _at_most(n, exported)) for place, n in enumerate(lengths)]
    feeds = []
    for seed, (batch, length) in enumerate(shapes):
        arrays = sample(exported.inputs, batch, length, padding_id, seed)
        feeds.append(arrays)
        want = module(
            **{spec.name: torch.from_numpy(arrays[spec.name]) for spec in exported.inputs}
        )
        got = run_onnx(exported.onnx_path, arrays)
        mask = arrays.get("attention_mask", arrays["input_ids"] | 1)
        for name, tensor in zip(exported.outputs, want, strict=True):
            worst = max(worst, largest_difference(got[name], tensor.numpy(), mask))
    bound = room(TOLERANCE, worst, exported.onnx_path, feeds)
    if not worst <= bound:
        raise NumericMismatchError(
            f"the exported ONNX model differs from torch by {worst:.3g}, more than {bound:.3g}",
            "this is a fault in Bertile's exporter or in the exporter of torch; please report it",
        )
    return worst


def _prepare_texts(checkpoint: checkpoints.Checkpoint, directory: Path) -> TextSettings:
    """Copy what makes ids of texts, and give the settings by which its tokenizer.json is set."""
    for path in checkpoint.files:
        shutil.copyfile(path, directory / path.name)
    if not (directory / "config.json").is_file():
        text = checkpoint.model.config.to_json_string()
        (directory / "config.json").write_text(text, encoding="utf-8")
    chain = checkpoint.chain
    labels = len(checkpoint.labels) or None
    settings = text_settings.read(directory, labels, chain.kind if chain else "dense")
    if chain:
        settings = dataclasses.replace(
            settings, include_prompt=chain.include_prompt, pooling=chain.pooling
        )
    return tokenizer_file.prepare(directory, settings, checkpoint.source)
