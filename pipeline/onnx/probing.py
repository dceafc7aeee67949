"""Runs an ONNX graph to see what each of its tensors is for several random batches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from bertile.base import scratch
from bertile.base.errors import ModelError
from bertile.onnx.exported import InputSpec
from bertile.onnx.graph import EXTERNAL_DATA_BYTES, OnnxGraph, save, weight_bytes
from bertile.onnx.samples import sample, session

# Different in every axis and product, so that a size says where it comes from.
SHAPES = ((2, 5), (3, 7), (1, 1), (2, 11), (1, 13))


@dataclass(frozen=True)
class Probes:
    """Every tensor's value, by name, in each of several runs that differ in all inputs."""

    feeds: tuple[dict[str, np.ndarray], ...]
    values: tuple[dict[str, np.ndarray], ...]

    def of(self, name: str) -> list[np.ndarray] | None:
        """Return the tensor's value in each run, or None if no run saw it."""
        if not all(name in run for run in self.values):
            return None
        return [run[name] for run in self.values]

    def constant(self, name: str) -> np.ndarray | None:
        """Return the tensor's value if it is the same in all runs."""
        values = self.of(name)
        if values is None or any(value.shape != values[0].shape for value in values):
            return None
        same = all(
            np.array_equal(value, values[0], equal_nan=value.dtype.kind == "f") for value in values
        )
        return values[0] if same else None

    def learn(self, name: str, values: Iterable[np.ndarray]) -> None:
        """Take a tensor that was made since: its value in each run."""
        for run, value in zip(self.values, values):
            run[name] = value

    def sizes(self, name: str) -> list[object] | None:
        """Return the tensor's shape; an axis that varies is a tuple of its size in each run."""
        values = self.of(name)
        if values is None or len({value.ndim for value in values}) != 1:
            return None
        return [merge(column) for column in zip(*(value.shape for value in values))]


def merge(column: Iterable[int]) -> object:
    """Return the one integer that all runs agree on, else the tuple of what each has."""
    values = tuple(int(size) for size in column)
    return values[0] if len(set(values)) == 1 else values


def probe(
    graph: OnnxGraph,
    inputs: tuple[InputSpec, ...],
    opset: int,
    batch: int | None,
    length: int | None,
) -> Probes:
    """Run the graph on random batches with every tensor shown; static axes keep their size."""
    names = [name for node in graph.nodes for name in node.output if name]
    shapes = [(batch or some, length or other) for some, other in SHAPES]
    feeds = tuple(_feed(inputs, shape, seed) for seed, shape in enumerate(shapes))
    model = graph.to_model(opset, outputs=names)
    with opened(model, optimize=False) as runner:
        shown = [output.name for output in runner.get_outputs()]
        values = tuple({**dict(zip(shown, _run(runner, shown, feed))), **feed} for feed in feeds)
    return Probes(feeds, values)


def evaluate(graph: OnnxGraph, name: str, feed: dict[str, np.ndarray], opset: int) -> np.ndarray:
    """Compute one tensor alone, from those inputs that it needs."""
    part = graph.cut(name)
    with opened(part.to_model(opset)) as runner:
        wanted = {value.name: feed[value.name] for value in part.inputs}
        return runner.run([name], wanted)[0]


def evaluated(
    graph: OnnxGraph, name: str, feed: dict[str, np.ndarray], opset: int
) -> np.ndarray | None:
    """As ``evaluate``; None where the graph cannot have a batch of that size."""
    try:
        return evaluate(graph, name, feed, opset)
    except Exception:  # onnxruntime has no public base class for its errors
        return None


@contextlib.contextmanager
def opened(model: onnx.ModelProto, optimize: bool = True) -> Iterator[Any]:
    """Open a model in ONNX Runtime; one past protobuf's 2 GiB goes through a file."""
    if weight_bytes(model) < EXTERNAL_DATA_BYTES:
        yield session(model.SerializeToString(), optimize)
        return
    with scratch.directory() as directory:
        path = Path(directory) / "model.onnx"
        save(model, path)
        yield session(path, optimize)


def _run(runner: Any, outputs: list[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    try:
        return runner.run(outputs, feed)
    except Exception as error:  # onnxruntime has no public base class for its errors
        batch, length = feed["input_ids"].shape
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"the model does not run with batch {batch} and length {length}: {reason}"
        ) from error


def _feed(
    inputs: tuple[InputSpec, ...], shape: tuple[int, int], seed: int
) -> dict[str, np.ndarray]:
    # Few different ids, so that every special id, the padding id for one, turns up at real tokens.
    small = [replace(spec, below=min(spec.below or 12, 12)) for spec in inputs]
    feed = sample(small, *shape, padding_id=-1, seed=seed)
    random = np.random.default_rng(seed)
    for spec in inputs:
        if spec.name == "input_ids":
            feed[spec.name] = random.integers(0, min(spec.below or 12, 12), shape).astype(
                spec.dtype
            )
        elif spec.name == "attention_mask" and shape[1] > 1:
            mask = random.integers(0, 2, shape)
            mask[:, random.integers(0, shape[1])] = 1
            feed[spec.name] = mask.astype(spec.dtype)
    return feed
