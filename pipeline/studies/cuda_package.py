"""Packs what a machine with a GPU needs for ``cuda_bench`` or ``cuda_checks`` into one small
archive, and makes a table of the bench's result.

    python -m bertile.studies.cuda_package -o bench.tar.xz --target cuda-sm90
    python -m bertile.studies.cuda_package --checks checks.tar.xz --target cuda-sm90
    python -m bertile.studies.cuda_package --table RESULT.json --into pipeline/bench/RESULTS.md

All layers of the model hold the values of one, and its vocabulary those of some thousand words:
stored once each by a compressor that remembers that far back, 220 MB of weights travel as 14. In
memory they lie as often as in any model.
"""

from __future__ import annotations

import argparse
import json
import lzma
import shutil
import statistics
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import bertile
from bertile.backends.backend import TOLERANCES
from bertile.base import scratch
from bertile.base.errors import UsageError, require
from bertile.base.progress import Progress
from bertile.base.tables import table
from bertile.bench import pages
from bertile.export import cached, synthetic
from bertile.families import model_config
from bertile.families.table import FAMILIES
from bertile.onnx import samples
from bertile.onnx.exported import ExportedModel
from bertile.studies import cuda_bench, cuda_checks

WORDS = 1009  # rows of the vocabulary that differ; a prime, so that no two tables stay in step
MEMORY = 256 << 20  # how far back the compressor looks
CHECKED = (
    *(("bert-tiny", precision) for precision in ("bf16", "fp32", "tf32", "int8")),
    *((f"{family.name}-tiny", "fp16") for family in FAMILIES),
    *(("bert-odd", precision) for precision in ("fp16", "int8")),
)
COLUMNS = (
    *("case", "engine", "ms", "p90 ms", "call ms", "of best PyTorch", "at most"),
    *("TFLOP/s", "% of peak", "cosine"),
)


def write(
    path: Path, target: str, name: str = "bert-base", config: dict[str, Any] | None = None
) -> int:
    """Write the archive; its size in bytes. ``config`` holds further fields of Config."""
    with scratch.directory("bench-") as place:
        root = Path(place)
        model(name, root / "model")
        for precision in ("fp16", "int8"):
            choices = {"target": target, "precision": precision, "runtime": "include"}
            bertile.compile(
                str(root / "model"),
                root / precision,
                bertile.Config(**choices, **(config or {})),
                Progress(),
            )
        shutil.copyfile(cuda_bench.__file__, root / "cuda_bench.py")
        return _archive(root, path)


def write_checks(path: Path, target: str, cases: Sequence[tuple[str, str]] = CHECKED) -> int:
    """Write bundles of small models in some precisions, with what ONNX Runtime gives for them."""
    with scratch.directory("checks-") as place:
        root = Path(place)
        for name, precision in cases:
            directory = root / f"{name}-{precision}"
            choices = {"target": target, "precision": precision, "runtime": "include"}
            config = bertile.Config(**choices)
            bertile.compile(f"synthetic:{name}", directory, config, Progress())
            exported = cached.export_cached(f"synthetic:{name}", config)
            answer(exported, precision, directory / cuda_checks.ANSWERS)
        shutil.copyfile(cuda_checks.__file__, root / "cuda_checks.py")
        return _archive(root, path)


def answer(
    exported: ExportedModel,
    precision: str,
    path: Path,
    shapes: Sequence[tuple[int, int]] = cuda_checks.SHAPES,
) -> None:
    """Requests of these shapes and ONNX Runtime's answers, for ``cuda_checks.numbers``."""
    arrays: dict[str, Any] = {"tolerance": TOLERANCES[precision], "requests": len(shapes)}
    padding = model_config.padding_id(model_config.beside(exported.directory))
    for number, (batch, length) in enumerate(shapes):
        inputs = samples.sample(exported.inputs, batch, length, padding, number)
        outputs = samples.run_onnx(exported.onnx_path, inputs)
        arrays |= {f"{number}.in.{name}": array for name, array in inputs.items()}
        arrays |= {f"{number}.out.{name}": array for name, array in outputs.items()}
    np.savez(path, **arrays)


def _archive(root: Path, path: Path) -> int:
    """Pack a directory; the archive's size."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 1, "dict_size": MEMORY}]
    path.parent.mkdir(parents=True, exist_ok=True)
    with lzma.open(path, "wb", filters=filters) as packed:
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for file in sorted(root.iterdir()):
                archive.add(file, file.name)
    return path.stat().st_size


def model(name: str, directory: Path) -> None:
    """A Hugging Face directory of a synthetic model in 16 bits, made of few distinct values."""
    torch, transformers = require("export", "torch", "transformers")
    network = synthetic.build(transformers.AutoModel, synthetic.config(name)).to(torch.float16)
    layers = network.encoder.layer
    with torch.no_grad():
        for layer in layers[1:]:
            layer.load_state_dict(layers[0].state_dict())
        words = network.embeddings.word_embeddings.weight
        words.copy_(words[torch.arange(len(words)) % WORDS])
    network.save_pretrained(directory)


def flops(config: dict[str, Any], lengths: Sequence[int]) -> float:
    """Of the matrix products of sequences of these lengths."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    weights = 4 * hidden * hidden + 2 * hidden * inner
    each = sum(2.0 * weights * length + 4.0 * hidden * length**2 for length in lengths)
    return config["num_hidden_layers"] * each


def as_text(result: dict[str, Any], markdown: bool = False) -> str:
    """The table of a result, and a sentence on where it was measured."""
    peak, rows = result["peaks"], []
    for row in result["rows"]:
        rate = flops(result["config"], row["lengths"]) / row["median_ms"] / 1e9
        times = (row["case"], row["engine"], row["median_ms"], row["p90_ms"], row["call_ms"])
        share = round(100 * rate / peak["tflops"]) if peak else None
        rest = (row["of_best_peer"], row["limit"], round(rate, 1), share, round(row["cosine"], 4))
        rows.append((*times, *rest))
    text = ", ".join(f"{name} {value}" for name, value in result["machine"].items()) + "."
    if peak:
        text += (
            f" Peaks measured beside it: {peak['tflops']:.0f} TFLOP/s (product of fp16 matrices),"
            f" {peak['copy_tbs']:.1f} TB/s (copy)."
        )
    if seconds := result["first_result_s"]:
        text += (
            f" First result {statistics.median(seconds):.2f} s after the start of a process"
            f" ({max(seconds):.2f} s at most)."
        )
    return f"{table(COLUMNS, rows, markdown)}\n\n{text}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the archive, or show a result."""
    parser = argparse.ArgumentParser(prog="python -m bertile.studies.cuda_package")
    parser.add_argument("-o", "--output", metavar="FILE", help="write the archive (.tar.xz)")
    parser.add_argument("--checks", metavar="FILE", help="write small bundles to be checked")
    parser.add_argument("--target", default="cuda-sm90")
    parser.add_argument("--model", default="bert-base", choices=sorted(synthetic.SYNTHETIC))
    parser.add_argument("--table", metavar="RESULT", nargs="+", help="show what cuda_bench wrote")
    parser.add_argument(
        "--into",
        "--update-readme",
        metavar="FILE[#NAME]",
        type=pages.argument("bench-cuda"),
        help="put it at <!-- bench-cuda --> of a page",
    )
    options = parser.parse_args(arguments)
    if options.output:
        count = write(Path(options.output), options.target, options.model)
        print(f"{options.output}: {count / 1e6:.1f} MB")
    elif options.checks:
        count = write_checks(Path(options.checks), options.target)
        print(f"{options.checks}: {count / 1e6:.1f} MB")
    elif options.table:
        text = as_text(merged(options.table), markdown=bool(options.into))
        print(text)
        if options.into:
            pages.write(options.into, "bench-cuda", text)
    else:
        raise UsageError("there is nothing to do", "give -o FILE, --checks FILE or --table RESULT")


def merged(paths: Sequence[str]) -> dict[str, Any]:
    """Results of one machine, whose cases were measured by several runs."""
    first, *rest = (json.loads(Path(path).read_text(encoding="utf-8")) for path in paths)
    for other in rest:
        first["rows"] += other["rows"]
    return first


if __name__ == "__main__":
    main()
