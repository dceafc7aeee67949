"""Finds out how far the outputs of a model see: other rows of the batch, padded positions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from bertile.base.errors import ModelError
from bertile.onnx.exported import InputSpec
from bertile.onnx.samples import sample

SHAPES = ((4, 7), (5, 3))  # (batch, length) of the requests that are tried
# What ONNX Runtime's own choice of kernels for another batch may change, relative to the largest
# value; another row's part in a mean is a hundred times that.
SAME = 1e-3


class Reach(NamedTuple):
    """The outputs that depend on other rows, and those that depend on padding."""

    rows: tuple[str, ...] = ()
    padding: tuple[str, ...] = ()

    def notes(self) -> list[str]:
        """What a person is told of them."""
        return [
            *([f"{', '.join(self.rows)}: depends on all rows of a batch"] if self.rows else []),
            *([f"{', '.join(self.padding)}: depends on padding"] if self.padding else []),
        ]


def look(runner: Any, inputs: Iterable[InputSpec], batch: int | None, length: int | None) -> Reach:
    """How far the outputs of a model in floats see, which ONNX Runtime runs."""
    sizes = (list(inputs), batch, length)
    return Reach(mixing(runner, *sizes), padded(runner, *sizes))


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


def padded(
    runner: Any, inputs: Iterable[InputSpec], batch: int | None, length: int | None
) -> tuple[str, ...]:
    """The outputs that change with what stands at masked positions, or with how many there are.

    Compared are real tokens of an output with an axis for the length, and others whole.
    """
    inputs = list(inputs)
    if "attention_mask" not in (spec.name for spec in inputs) or length == 1:
        return ()
    seen: set[str] = set()
    outputs = runner.get_outputs()
    names = [output.name for output in outputs]
    for seed, (rows, tokens) in enumerate(SHAPES):
        feed = sample(inputs, batch or rows, length or tokens + 6, padding_id=1, seed=seed)
        mask = feed["attention_mask"]
        mask[0, -1] = 0  # the first row is full otherwise
        values = runner.run(names, feed)
        for other in _other_padding(feed, inputs, seed, dynamic=length is None):
            cut_mask = other["attention_mask"]
            for output, value, changed in zip(outputs, values, runner.run(names, other)):
                real = _real_tokens(value, output.shape, mask, (batch, length))
                if not _same(real, _real_tokens(changed, output.shape, cut_mask, (batch, length))):
                    seen.add(output.name)
    return tuple(name for name in names if name in seen)


def _other_padding(
    feed: dict[str, np.ndarray], inputs: list[InputSpec], seed: int, dynamic: bool
) -> list[dict[str, np.ndarray]]:
    """The same real tokens beside other ids, and beside more padding where the length may grow."""
    mask = feed["attention_mask"]
    drawn = sample(inputs, *mask.shape, padding_id=1, seed=200 + seed)
    same = {name: np.where(mask == 1, array, drawn[name]) for name, array in feed.items()}
    others = [{**same, "attention_mask": mask}]
    if dynamic:
        longer = {name: np.pad(array, ((0, 0), (0, 3))) for name, array in feed.items()}
        longer["input_ids"][:, mask.shape[1] :] = 1
        others.append(longer)
    return others


def _real_tokens(
    value: np.ndarray,
    shape: Sequence[Any],
    mask: np.ndarray,
    static: tuple[int | None, int | None],
) -> np.ndarray:
    """Of an output by token what is real, (tokens, …); else the output as it is."""
    axes = named_axes(shape, *static)
    if "batch" not in axes or "length" not in axes:
        return value
    return np.moveaxis(value, (axes.index("batch"), axes.index("length")), (0, 1))[mask != 0]


def named_axes(shape: Sequence[Any], batch: int | None, length: int | None) -> list[Any]:
    """A shape whose axes of batch and length have these names, where they are static too."""
    axes = list(shape)
    if axes and axes[0] == batch:
        axes[0] = "batch"
    if len(axes) > 2 and axes[1] == length:
        axes[1] = "length"
    return axes


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
    axes = named_axes(shape, batch, None)
    return axes.index("batch") if axes.count("batch") == 1 else None


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
