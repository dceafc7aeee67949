"""The token-lane layout and the words that kernels are written in."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import tvm_ffi
from tvm import tirx
from tvm.tirx.script import builder as T

from bertile.schedules import BLOCK_TOKENS
from bertile.schedules.cpu import lanes
from bertile.targets import rows as targets


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 160])
def test_from_lanes_undoes_to_lanes(tokens):
    rows = np.random.default_rng(0).standard_normal((tokens, 5)).astype("float32")
    there = lanes.to_lanes(rows)
    assert there.shape == (-(-tokens // BLOCK_TOKENS), 5, BLOCK_TOKENS)
    back = lanes.from_lanes(there)
    assert np.array_equal(back[:tokens], rows)
    assert not back[tokens:].any()


def test_to_lanes_puts_the_channels_of_a_token_a_vector_apart():
    rows = np.arange(34, dtype="float32").reshape(17, 2)
    assert lanes.to_lanes(rows)[0, 1, 3] == rows[3, 1]
    assert lanes.to_lanes(rows)[1, 0, 0] == rows[16, 0]


@pytest.mark.parametrize("row,vectors", [("x86-avx512", 32), ("x86-avx2", 8)])
def test_vector_capacity_counts_vectors_of_16_floats(row, vectors):
    assert lanes.vector_capacity(targets.resolve(row)) == vectors
    assert lanes.vector_capacity(SimpleNamespace(registers=32, vector_bits=128)) == 8


def allocations(func):
    """The bytes of each buffer that a PrimFunc allocates."""
    buffers = []
    tvm_ffi.structural_walk(func.body, (tirx.AllocBuffer, lambda node: buffers.append(node.buffer)))
    return [4 * int(np.prod([int(extent) for extent in buffer.shape])) for buffer in buffers]


@pytest.mark.parametrize("vectors", [1, 15, 16, 30, 31])
def test_registers_are_buffers_that_become_stack_slots(vectors):
    with lanes.kernel("sums") as builder:
        x = builder.activation("x", vectors)
        y = builder.activation("y", vectors)
        with T.serial(builder.blocks) as block:
            total = lanes.registers(vectors)
            for i, register in enumerate(total):
                lanes.write(register, lanes.load(x, block, i))
            for i, register in enumerate(total):
                lanes.store(y, lanes.read(register), block, i)
    sizes = allocations(builder.func)
    assert sum(sizes) == vectors * BLOCK_TOKENS * 4
    assert all(size < 1024 for size in sizes)


def test_kernel_solves_the_number_of_blocks_from_its_argument(kernels):
    with lanes.kernel("double") as builder:
        x, y = builder.activation("x", 3), builder.activation("y", 3)
        with T.serial(builder.blocks) as block, T.serial(3) as c:
            lanes.store(y, lanes.load(x, block, c) * lanes.splat(2.0), block, c)
    library = kernels.compile(builder.func)
    for blocks in (1, 5):
        x = np.random.default_rng(0).standard_normal((blocks, 3, BLOCK_TOKENS)).astype("float32")
        assert np.array_equal(kernels.call(library, [x], x.shape), 2 * x)
