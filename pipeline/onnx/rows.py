"""Finds out which outputs of a model depend on more than their own row of the batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from bertile.base.errors import ModelError
from bertile.onnx.exported import InputSpec
from bertile.onnx.samples import sample

SHAPES = ((4, 7), (5, 3))  # (batch, length) of the requests that are tried
# What ONNX Runtime's own choice of kernels for another batch may change, relative to the largest
# value; another row's part in a mean is a hundred times that.
SAME = 1e-3


def mixing(
    runner: Any, inputs: Iterable[InputSpec], batch: int | None, length: int | None
) -> tuple[str, ...]:
    """The outputs whose rows change with other rows of the batch, or with how many there are.

    ``runner`` is the model in floats, in ONNX Runtime. A row is computed beside others and, where
    the batch is not static, by itself. An output without an axis for the batch depends on all.
    """
    if batch == 1:
        return ()
    axes = {output.name: _batch_axis(output.shape, batch) for output in runner.get_outputs()}
    mixed = {name for name, axis in axes.items() if axis is None}
    for seed, (rows, tokens) in enumerate(SHAPES):
        inputs = list(inputs)
        whole = sample(inputs, batch or rows, length or tokens, padding_id=1, seed=seed)
        parts = _beside_others(whole, inputs, seed) if batch else _apart(whole)
        names = [name for name in axes if name not in mixed]
        values = dict(zip(names, runner.run(names, whole))) if names else {}
        for chosen, place, feed in parts:
            for name, part in zip(names, runner.run(names, feed) if names else ()):
                row = np.take(values[name], [chosen], axis=axes[name])
                alone = np.take(part, [place], axis=axes[name])
                if not _same(row, alone):
                    mixed.add(name)
    return tuple(name for name in axes if name in mixed)


def check_axes(outputs: Sequence[Any]) -> None:
    """Raise ModelError for an output whose shape no request tells: flattened tokens, say."""
    for output in outputs:
        for size in output.shape:
            if not isinstance(size, int) and size not in ("batch", "length"):
                raise ModelError(
                    f"output '{output.name}' has the shape {tuple(output.shape)}, in which an axis"
                    " is neither the batch nor the length nor always the same",
                    "export an output with an axis for the batch and, if it is of tokens, one for"
                    " the length: (batch, length, …) and not (tokens, …)",
                )


def _batch_axis(shape: Sequence[Any], batch: int | None) -> int | None:
    """The one axis that counts rows; None where there is none, or more than one."""
    if batch is not None:
        return 0 if shape and shape[0] == batch else None
    places = [axis for axis, size in enumerate(shape) if size == "batch"]
    return places[0] if len(places) == 1 else None


def _apart(whole: dict[str, np.ndarray]) -> list[tuple[int, int, dict[str, np.ndarray]]]:
    """Each row by itself: its number, its place in the request, and the request."""
    count = len(next(iter(whole.values())))
    return [(i, 0, {name: array[i : i + 1] for name, array in whole.items()}) for i in range(count)]


def _beside_others(
    whole: dict[str, np.ndarray], inputs: list[InputSpec], seed: int
) -> list[tuple[int, int, dict[str, np.ndarray]]]:
    """As ``_apart``, each row in its place beside rows that are drawn anew."""
    batch, length = next(iter(whole.values())).shape
    parts = []
    for row in range(min(batch, 3)):
        feed = sample(inputs, batch, length, padding_id=1, seed=100 + 10 * seed + row)
        for name, array in feed.items():
            array[row] = whole[name][row]
        parts.append((row, row, feed))
    return parts


def _same(row: np.ndarray, alone: np.ndarray) -> bool:
    if row.shape != alone.shape:
        return False
    row, alone = row.astype(np.float64), alone.astype(np.float64)
    finite = np.isfinite(row)
    if not np.array_equal(finite, np.isfinite(alone)):
        return False
    room = SAME * max(1.0, float(np.abs(row[finite]).max(initial=0.0)))
    return bool(np.all(np.abs(row[finite] - alone[finite]) <= room))
