"""The CUDA loader: numbers, graphs, memory, streams and refusals, on a driver made of Python."""

from __future__ import annotations

import ast
import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import lazy_driver
import numpy as np
import pytest

from bertile import bundle, cuda_loader, loader
from bertile.errors import BertileError, BundleError, InputError, PlatformError

RNG = np.random.default_rng(0)
PARAMS = {
    "words": RNG.standard_normal((50, 8), dtype=np.float32),
    "types": RNG.standard_normal((2, 8), dtype=np.float32),
    "scale": RNG.standard_normal(8, dtype=np.float32),
}
NAMES = ("input_ids", "attention_mask", "token_type_ids")
MANIFEST = {
    "bertile": "0.1.0",
    "entry": "main",
    "model": {"source": "tiny", "family": "bert", "head": "encoder", "max_length": 64},
    "target": {"name": "cuda-sm90", "arch": "cuda", "features": ["sm_90"]},
    "lanes": 16,
    "inputs": [
        {"name": "input_ids", "dtype": "int64", "below": 50, "default": None},
        {"name": "attention_mask", "dtype": "int64", "below": 2, "default": "ones"},
        {"name": "token_type_ids", "dtype": "int64", "below": 2, "default": "zeros"},
    ],
    "outputs": [
        {"name": "hidden", "dtype": "float32", "axes": ["batch", "length", 8]},
        {"name": "pooled", "dtype": "float32", "axes": ["batch", 8]},
    ],
    "static": {"batch": None, "length": None},
}
ROWS = ["int32", "16*blocks"]
SIZES = [["int32", "batch"], ["int32", "length"], ["int32", "blocks"]]
PLAN = {
    "schema": 1,
    "inputs": [
        *({"name": name, "dtype": "int64", "shape": ["batch", "length"]} for name in NAMES),
        {"name": "blocks", "dtype": "int32", "shape": ["blocks", 4]},
    ],
    "weights": list(PARAMS),
    "buffers": [
        {"bytes": "blocks*16*8*4"},
        {"bytes": "blocks*16*4"},
        {"bytes": "blocks*16*8*4"},
        {"bytes": "batch*length*8*4"},
        {"bytes": "batch*8*4"},
    ],
    "outputs": [
        {"name": "hidden", "dtype": "float32", "shape": ["batch", "length", 8], "buffer": 3},
        {"name": "pooled", "dtype": "float32", "shape": ["batch", 8], "buffer": 4},
    ],
    "steps": [
        {
            "entry": "embed", "grid": ["blocks", 1, 1], "threads": 128, "shared": 0,
            "arguments": [["input", 0], ["input", 2], ["input", 3], ["weight", 0], ["weight", 1],
                          ["buffer", 0], *SIZES],
        },
        {
            "entry": "keys", "grid": ["blocks", 1, 1], "threads": 32, "shared": 0,
            "arguments": [["input", 1], ["input", 3], ["buffer", 1], *SIZES],
        },
        {
            "entry": "scaled", "grid": ["blocks", 1, 1], "threads": 128, "shared": 100000,
            "arguments": [["buffer", 0], ["weight", 2], ["buffer", 2], ROWS, ["float32", 0.5]],
        },
        {
            "entry": "hidden", "grid": ["batch", "(length+15)//16", 1], "threads": 128, "shared": 0,
            "arguments": [["buffer", 2], ["input", 3], ["buffer", 3], *SIZES],
        },
        {
            "entry": "pooled", "grid": ["batch", 1, 1], "threads": 32, "shared": 0,
            "when": "batch < 1000",
            "arguments": [["buffer", 2], ["buffer", 1], ["input", 3], ["buffer", 4], *SIZES],
        },
    ],
}  # fmt: skip


# -- kernels -----------------------------------------------------------------------------------


def at(address, shape, dtype=np.float32):
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype).reshape(shape)


def places(table, blocks):
    """(row of the batch, positions) of each block of tokens."""
    return [(row, first + np.arange(16)) for row, first, _, _ in at(table, (blocks, 4), np.int32)]


def embed(grid, block, cells):
    ids, types, table, words, kinds, out, batch, length, blocks = cells
    ids, types = (at(one, (batch, length), np.int64) for one in (ids, types))
    words, kinds = at(words, (50, 8)), at(kinds, (2, 8))
    assert grid == (blocks, 1, 1) and block == (128, 1, 1)
    for index, (row, positions) in enumerate(places(table, blocks)):
        taken = np.minimum(positions, length - 1)
        at(out, (blocks, 16, 8))[index] = words[ids[row, taken]] + kinds[types[row, taken]]


def keys(grid, block, cells):
    mask, table, out, batch, length, blocks = cells
    mask = at(mask, (batch, length), np.int64)
    for index, (row, positions) in enumerate(places(table, blocks)):
        inside = positions < length
        at(out, (blocks, 16))[index] = inside & (mask[row, np.minimum(positions, length - 1)] != 0)


def scaled(grid, block, cells):
    x, scale, out, rows, half = cells
    factor = np.uint32(half).view(np.float32)
    at(out, (rows, 8))[...] = at(x, (rows, 8)) * at(scale, 8) * factor


def hidden(grid, block, cells):
    x, table, out, batch, length, blocks = cells
    result = at(out, (batch, length, 8))
    result[...] = 0
    for index, (row, positions) in enumerate(places(table, blocks)):
        inside = positions < length
        result[row, positions[inside]] = at(x, (blocks, 16, 8))[index][inside]


def pooled(grid, block, cells):
    x, used, table, out, batch, length, blocks = cells
    result = at(out, (batch, 8))
    result[...] = 0
    for index, (row, _) in enumerate(places(table, blocks)):
        result[row] += at(used, (blocks, 16))[index] @ at(x, (blocks, 16, 8))[index]


KERNELS = {one.__name__: one for one in (embed, keys, scaled, hidden, pooled)}
for step in PLAN["steps"]:
    KERNELS[step["entry"]].arguments = len(step["arguments"])


def expected(input_ids, attention_mask=None, token_type_ids=None):
    ids = np.asarray(input_ids)
    mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask)
    types = np.zeros_like(ids) if token_type_ids is None else np.asarray(token_type_ids)
    x = (PARAMS["words"][ids] + PARAMS["types"][types]) * PARAMS["scale"] * np.float32(0.5)
    behind = np.arange(ids.shape[1]) >= loader.sequence_ends(mask)[:, None]
    return {
        "hidden": np.where(behind[..., None], 0, x),
        "pooled": (x * (mask != 0)[..., None]).sum(axis=1),
    }


def same(found, wanted):
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-5)


def request(batch, length, seed=0):
    rng = np.random.default_rng(seed)
    ends = rng.integers(1, length + 1, batch)
    mask = (np.arange(length) < ends[:, None]).astype(np.int64)
    mask[:, 0] &= rng.integers(0, 2, batch)  # holes, and rows without a token
    return {
        "input_ids": rng.integers(0, 50, (batch, length)),
        "attention_mask": mask,
        "token_type_ids": rng.integers(0, 2, (batch, length)),
    }


# -- bundles and drivers -----------------------------------------------------------------------

PTX = "//\n.version 8.3\n.target sm_80\n.address_size 64\n"


def write(directory, plan=PLAN, manifest=MANIFEST, ptx=PTX):
    """A bundle as the builder writes one for a GPU."""
    library = directory.with_name(f"{directory.name}.cubin")
    library.write_bytes(b"cubin")

    def add(place):
        (place / "lib.so").rename(place / "kernels.cubin")
        (place / "plan.json").write_text(json.dumps(plan))
        if ptx:
            (place / "kernels.ptx").write_text(ptx)
        for module in (loader, cuda_loader):
            shutil.copyfile(module.__file__, place / Path(module.__file__).name)

    return bundle.write(manifest, library, PARAMS, [], directory, add)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A bundle; not to be changed."""
    return write(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture
def install(monkeypatch):
    """Puts a driver in the place of the machine's; no test may use one wrongly."""
    made = []

    def put(driver):
        monkeypatch.setattr(cuda_loader, "open_driver", lambda path: driver)
        made.append(driver)
        return driver

    yield put
    for driver in made:
        assert driver.misuse == []


@pytest.fixture
def driver(install):
    return install(lazy_driver.Driver(KERNELS))


@pytest.fixture
def model(driver, directory):
    with loader.load(directory) as loaded:
        yield loaded


# -- numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 16), (1, 17), (3, 5), (7, 40), (2, 64)])
def test_call_equals_numpy(model, batch, length):
    for seed in range(3):
        given = request(batch, length, seed)
        same(model(**given), expected(**given))
