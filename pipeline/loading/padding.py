"""Pads the inputs of a pass to the shape that it has, and cuts the padding off its outputs."""

from __future__ import annotations

import numpy as np

from bertile.loading.errors import AGAIN, BundleError
from bertile.loading.memory import aligned, empty


def fit(value, first: int, shape: tuple, room: tuple, dtype: str) -> np.ndarray:
    """Return `shape` of an array from its row `first` on, or a number, padded with 0 to `room`."""
    if not isinstance(value, int):
        value = value[first : first + shape[0]]
        if shape == room:
            return aligned(value, dtype)
    out = empty(room, dtype)
    if shape != room:
        out.fill(0)
    out[: shape[0], : shape[1]] = value
    return out


def check_outputs(arrays: list[np.ndarray], specs: list[dict], room: tuple[int, int]) -> None:
    """Raise BundleError unless a pass of (batch, length) gave what the manifest says."""
    sizes = {"batch": room[0], "length": room[1]}
    for array, spec in zip(arrays, specs):
        shape = tuple(sizes.get(axis, axis) for axis in spec["axes"])
        if array.shape != shape or array.dtype != spec["dtype"]:
            is_, should = (f"{array.dtype} {array.shape}", f"{spec['dtype']} {shape}")
            raise BundleError(f"the output {spec['name']} is {is_}, not {should}", AGAIN)


def cut(axes: list, pieces: list[np.ndarray], length: int, ends: np.ndarray) -> np.ndarray:
    """Join the chunks of one output, cut the padding off and zero what no block has computed."""
    sizes = {"batch": len(ends), "length": length}
    array = pieces[0]
    if len(pieces) > 1 and "batch" in axes:
        array = np.concatenate(pieces, axis=axes.index("batch"))
    wanted = tuple(sizes.get(axis, size) for axis, size in zip(axes, array.shape))
    if array.shape != wanted:
        array = array[tuple(slice(size) for size in wanted)].copy()
    if "batch" in axes and "length" in axes:
        by_token = np.moveaxis(array, (axes.index("batch"), axes.index("length")), (0, 1))
        for row in np.flatnonzero(ends < length):
            by_token[row, ends[row] :] = 0
    return array
