"""Checks the outputs of a pass, and cuts off what its inputs were padded with."""

from __future__ import annotations

import numpy as np

from bertile.loading.errors import AGAIN, BundleError


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
