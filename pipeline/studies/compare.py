"""Compares what each precision costs a model, on a file to evaluate with.

python -m bertile.studies.compare MODEL --eval FILE --against onnxruntime-int8
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bertile import backends, driver, loader
from bertile.base import scratch
from bertile.base.errors import PlatformError, UsageError, nearest, require
from bertile.base.progress import Progress
from bertile.base.quiet import quiet
from bertile.base.tables import size, table
from bertile.cli.config_flags import cache_directory
from bertile.cli.option_lists import words
from bertile.config import Config
from bertile.evaluation import datasets
from bertile.evaluation.datasets import Dataset
from bertile.export import cached
from bertile.numerics.precision import PRECISIONS
from bertile.onnx.exported import ExportedModel
from bertile.onnx.samples import session
from bertile.targets import rows as targets
from bertile.text import batches
from bertile.text.tokens import TextTokenizer

PEERS = ("onnxruntime-int8",)


class OnnxModel:
    """An ONNX file, run by ONNX Runtime, that is called as a loaded bundle is."""

    def __init__(self, path: Path, model: ExportedModel) -> None:
        self.inputs = tuple(spec.name for spec in model.inputs)
        self._session, self._outputs = session(path), model.outputs

    def __call__(self, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(self._outputs, self._session.run(list(self._outputs), arrays)))


def compare(
    model: str,
    dataset: Dataset,
    config: Config,
    precisions: Sequence[str] = PRECISIONS,
    against: Sequence[str] = (),
    progress: Progress | None = None,
    quantization: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """A row for float32, each other precision and each peer: "engine", "bytes", and the metrics.

    All but accuracy is measured against our float32. `config` holds what the precisions have in
    common, `quantization` more fields of it, for the precisions that take them.
    """
    quantization = quantization or {}
    _check("precision", precisions, PRECISIONS)
    _check("peer", against, PEERS)
    model_files = cached.export_cached(model, config, progress)
    datasets.output_of(model_files.head, dataset)
    order = ["fp32", *(precision for precision in dict.fromkeys(precisions) if precision != "fp32")]
    rows, reference = [], None
    with scratch.directory() as place:
        for precision in order:
            path = place / precision
            driver.compile(model, path, _with_precision(config, precision, quantization), progress)
            answers = datasets.answers(path, dataset, config.threads)
            reference = answers if reference is None else reference
            bytes_ = (path / loader.WEIGHTS).stat().st_size
            rows.append(
                _row(f"bertile {precision}", bytes_, dataset, answers, reference, model_files)
            )
        for peer in against:
            path = quantized_by_onnxruntime(model_files, place / "int8.onnx")
            answers = _answers(OnnxModel(path, model_files), model_files, dataset)
            bytes_ = path.stat().st_size
            rows.append(_row(peer, bytes_, dataset, answers, reference, model_files))
    return rows


def quantized_by_onnxruntime(model: ExportedModel, path: Path) -> Path:
    """The model with ONNX Runtime's dynamic quantization: s8 weights per channel, u8 inputs."""
    (quantization,) = require("compile", "onnxruntime.quantization")
    with quiet():
        kind = quantization.QuantType.QInt8
        quantization.quantize_dynamic(model.onnx_path, path, per_channel=True, weight_type=kind)
    return path


def as_text(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table."""
    columns = [name for name in rows[0] if name not in ("engine", "bytes")]
    cells = [
        [row["engine"], size(row["bytes"]), *(f"{row[name]:.5f}" for name in columns)]
        for row in rows
    ]
    return table(("engine", "weights", *columns), cells)


def _with_precision(config: Config, precision: str, quantization: Mapping[str, Any]) -> Config:
    row = PRECISIONS[precision]
    takes = {
        "calibrate": row.quantized,
        "smooth": row.quantized,
        "ranges": row.ranges,
        "group_size": row.groups,
        "rounding": row.groups,
    }
    values = {name: value for name, value in quantization.items() if takes[name]}
    return dataclasses.replace(config, precision=precision, **values)


def _possible(config: Config) -> list[str]:
    """The precisions that the target has."""
    target = targets.resolve(config.target, config.threads)
    possible = []
    for precision in PRECISIONS:
        try:
            backends.of(target).check(Config(precision=precision), target)
        except PlatformError:
            continue
        possible.append(precision)
    return possible


def _answers(model: OnnxModel, files: ExportedModel, dataset: Dataset) -> np.ndarray:
    limit = min(bound for bound in (files.max_length, files.length, 512) if bound)
    encodings = TextTokenizer(files.directory, files.text, limit).encode(dataset.texts)
    output = datasets.output_of(files.head, dataset)
    return np.stack([outputs[output] for outputs in batches.run_all(model, encodings)])


def _row(
    engine: str,
    bytes_: int,
    dataset: Dataset,
    answers: np.ndarray,
    reference: np.ndarray,
    model: ExportedModel,
) -> dict[str, Any]:
    metrics = dataset.metrics(answers, reference, model.labels)
    return {"engine": engine, "bytes": bytes_, **metrics}


def _check(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise UsageError(f"{what} '{name}' is unknown{nearest(name, known)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile each precision, evaluate it, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bertile.studies.compare")
    add = parser.add_argument
    add("model", metavar="MODEL", help="what bertile compile takes")
    add("--eval", metavar="FILE", required=True, help="labelled .tsv or .jsonl, or sentences .txt")
    add("--precision", metavar="LIST", help="with commas between (default: all of this machine)")
    add("--against", metavar="LIST", default="", help="onnxruntime-int8")
    add("--threads", metavar="N", type=int, help="threads to use")
    add("--calibrate", metavar="FILE", help="texts or an .npz, for int8")
    add("--ranges", metavar="NAME", default="dynamic", help="how int8 finds its ranges")
    add("--smooth", metavar="0..1", type=float, help="of SmoothQuant, for int8 and int4")
    add("--rounding", metavar="NAME", default="nearest", help="how int4 rounds: nearest or gptq")
    add("--group-size", metavar="32|64", type=int, default=32, help="inputs with a scale, for int4")
    options = parser.parse_args(arguments)
    common = Config(threads=options.threads, cache_dir=cache_directory(None))
    names = ("calibrate", "ranges", "smooth", "rounding", "group_size")
    rows = compare(
        options.model,
        datasets.read(Path(options.eval)),
        common,
        words([options.precision]) if options.precision else _possible(common),
        words([options.against]),
        Progress(),
        {name: getattr(options, name) for name in names},
    )
    print(as_text(rows))


if __name__ == "__main__":
    main()
