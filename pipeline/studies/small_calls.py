"""Times calls of a model so small that what a call costs beside its kernels shows, beside ONNX
Runtime.

python -m bertile.studies.small_calls
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bertile import driver, loader
from bertile.base import scratch
from bertile.base.errors import ModelError, require
from bertile.base.progress import Progress
from bertile.base.tables import table
from bertile.bench import sameness
from bertile.cli.config_flags import cache_directory
from bertile.config import Config
from bertile.export import cached
from bertile.onnx.exported import ExportedModel
from bertile.onnx.samples import sample

# Of the default model: its kernels take a few microseconds.
SIZES = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
TURN = 50  # calls of one engine before it is the next one's turn


class Row(NamedTuple):
    """Microseconds of one engine's calls."""

    engine: str
    p10: float
    median: float
    p90: float


def small_calls(
    model: Any, length: int, repeat: int, config: Config, progress: Progress | None = None
) -> list[Row]:
    """Compile MODEL, a name or a transformers model, and time both engines on one thread.

    Each makes `repeat` calls with one sequence of `length` tokens, in turns.
    Raises ModelError where the two answer differently.
    """
    exported = cached.export_cached(model, config, progress)
    inputs = sample(exported.inputs, 1, length, padding_id=0)
    with scratch.directory() as place:
        driver.compile(model, place / "bundle", config, progress)
        with loader.load(place / "bundle", threads=1) as bundle:
            engines = {
                "Bertile": lambda: list(bundle(**inputs).values()),
                "ONNX Runtime": _onnxruntime(exported, inputs),
            }
            _check_same(*(call() for call in engines.values()), inputs, config.precision)
            times = timed_in_turns(engines, repeat)
    return [
        Row(name, *(float(share) for share in np.quantile(taken, (0.1, 0.5, 0.9))))
        for name, taken in times.items()
    ]


def timed_in_turns(engines: Mapping[str, Callable[[], Any]], repeat: int) -> dict[str, list[float]]:
    """Microseconds of `repeat` calls of each, after as many in a turn that are not counted."""
    times: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(-1, -(-repeat // TURN)):
        for name, call in engines.items():
            for _ in range(TURN):
                began = time.perf_counter_ns()
                call()
                taken = (time.perf_counter_ns() - began) / 1e3
                if turn >= 0:
                    times[name].append(taken)
    return times


def as_text(rows: Sequence[Row], markdown: bool = False) -> str:
    """A row per engine; the ratio is Bertile's median divided by its own."""
    cells = [
        (row.engine, *(round(taken, 1) for taken in row[1:]), rows[0].median / row.median)
        for row in rows
    ]
    return table(("engine", "p10 µs", "median µs", "p90 µs", "ratio"), cells, markdown)


def smallest() -> Any:
    """A BERT of one layer and random weights, always the same."""
    torch, transformers = require("export", "torch", "transformers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.BertModel(transformers.BertConfig(**SIZES)).eval()


def _onnxruntime(exported: ExportedModel, inputs: Mapping[str, np.ndarray]) -> Callable[[], Any]:
    (runtime,) = require("compile", "onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    path, providers = str(exported.onnx_path), ["CPUExecutionProvider"]
    session = runtime.InferenceSession(path, options, providers=providers)
    return lambda: session.run(None, inputs)


def _check_same(
    ours: list[np.ndarray],
    theirs: list[np.ndarray],
    inputs: dict[str, np.ndarray],
    precision: str,
) -> None:
    row = {"engine": "Bertile", "precision": precision, **sameness.compared(theirs, ours, inputs)}
    if doubt := sameness.doubt(row):
        raise ModelError(doubt)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile, time, print the table."""
    parser = argparse.ArgumentParser(prog="python -m bertile.studies.small_calls")
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", help="default: a BERT of one layer, 32 wide")
    add("--length", metavar="N", type=int, default=8, help="tokens of the sequence (default: 8)")
    add("--repeat", metavar="N", type=int, default=3000, help="calls of each (default: 3000)")
    add("--precision", metavar="NAME", default="fp32", help="of Bertile's (default: fp32)")
    add("--markdown", action="store_true", help="print the table as Markdown")
    options = parser.parse_args(arguments)
    config = Config(threads=1, precision=options.precision, cache_dir=cache_directory(None))
    rows = small_calls(options.model or smallest(), options.length, options.repeat, config)
    print(as_text(rows, options.markdown))


if __name__ == "__main__":
    main()
