"""Defines the token-lane layout, vectors of 16 tokens of one channel, and the words kernels are
written in.

An activation of C channels is ``(m, C, 16)``: block of tokens, channel, token. One vector holds one
channel of a block's tokens, a token a lane, so that weights are broadcast, and normalisation and
softmax need no horizontal reduction. LLVM makes of it as many registers as the machine needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from bertile.schedules import BLOCK_TOKENS

RAMP = tirx.Ramp(0, 1, BLOCK_TOKENS)
CACHE_LINE = 64  # bytes


class KernelBuilder:
    """A kernel under construction; ``func`` is the finished PrimFunc after the ``with`` block."""

    func: tirx.PrimFunc

    def __init__(self) -> None:
        self.blocks = T.int32()  # m: how many blocks of 16 tokens come in
        self.frames = ExitStack()

    def tensor(self, name: str, *shape: Any, dtype: str = "float32") -> Any:
        """An argument; a shape that names ``blocks`` is solved from the tensor that comes in."""
        if all(isinstance(extent, int) for extent in shape):
            return T.arg(name, T.Buffer(shape, dtype))
        return T.match_buffer(T.arg(name, T.handle()), shape, dtype)

    def link(self, llvm: str) -> None:
        """Let the body call the functions of this LLVM IR; to be said after the last argument."""
        if llvm:
            self.frames.enter_context(T.attr(0, "pragma_import_llvm", llvm))

    def activation(self, name: str, channels: int, dtype: str = "float32") -> Any:
        """An argument (m, channels, 16)."""
        return self.tensor(name, self.blocks, channels, BLOCK_TOKENS, dtype=dtype)


@contextmanager
def kernel(name: str) -> Iterator[KernelBuilder]:
    """Open a kernel; statements inside go into its body."""
    with IRBuilder() as ir:
        with T.prim_func(s_tir=True):
            T.func_name(name)
            T.func_attr({"tirx.noalias": True})
            builder = KernelBuilder()
            with builder.frames:
                yield builder
    builder.func = ir.get()


def load(buffer: Any, *index: Any) -> Any:
    """The 16 lanes at ``buffer[*index, 0:16]``."""
    return buffer[(*index, RAMP)]


def store(buffer: Any, value: Any, *index: Any) -> None:
    """Write 16 lanes to ``buffer[*index, 0:16]``."""
    T.buffer_store(buffer, value, [*index, RAMP])


def prefetch(buffer: Any, *index: Any, level: int = 2) -> None:
    """Ask for the cache line of an element, which may lie outside of the buffer, in the cache of
    that level. The kernel links ``llvm.PREFETCH``.
    """
    T.evaluate(tirx.call_extern("int32", f"bertile_prefetch{level}", T.address_of(buffer[index])))


def splat(value: Any) -> Any:
    """A scalar in all 16 lanes."""
    if isinstance(value, (int, float)):
        value = tirx.const(float(value), "float32")
    return tirx.Broadcast(value, BLOCK_TOKENS)


def registers(vectors: int, dtype: str = "float32") -> list[Any]:
    """Accumulators that LLVM keeps in registers: one buffer per 15 vectors or fewer.

    A buffer of 1024 bytes or more would live on the heap, with a store at every multiply-add; and
    only buffers under that size become stack slots that LLVM promotes.
    """
    per_buffer = 15
    buffers = [
        T.alloc_buffer((min(per_buffer, vectors - start), BLOCK_TOKENS), dtype)
        for start in range(0, vectors, per_buffer)
    ]
    return [(buffers[i // per_buffer], i % per_buffer) for i in range(vectors)]


@contextmanager
def loop(count: int, unroll: int = 1) -> Iterator[Any]:
    """A loop over ``count`` steps, so many in a row where that divides it."""
    if unroll == 1 or count % unroll:
        with T.serial(count) as step:
            yield step
    else:
        with T.serial(count // unroll) as outer, T.unroll(unroll) as inner:
            yield outer * unroll + inner


def read(register: tuple[Any, int]) -> Any:
    """The value of an accumulator."""
    return load(*register)


def write(register: tuple[Any, int], value: Any) -> None:
    """Set an accumulator."""
    store(register[0], value, register[1])


def vector_capacity(row: Any) -> int:
    """How many vectors of 16 floats the machine's registers hold (an AVX2 machine: 8)."""
    return row.registers * row.vector_bits // (BLOCK_TOKENS * 32)


def to_lanes(rows: np.ndarray) -> np.ndarray:
    """(tokens, C) → (tokens / 16, C, 16), for tests and references; padded with zeros."""
    tokens, channels = rows.shape
    blocks = -(-tokens // BLOCK_TOKENS)
    padded = np.zeros((blocks * BLOCK_TOKENS, channels), rows.dtype)
    padded[:tokens] = rows
    return np.ascontiguousarray(padded.reshape(blocks, BLOCK_TOKENS, channels).transpose(0, 2, 1))


def from_lanes(lanes: np.ndarray) -> np.ndarray:
    """(m, C, 16) → (m * 16, C), the inverse of :func:`to_lanes`."""
    blocks, channels, _ = lanes.shape
    return np.ascontiguousarray(lanes.transpose(0, 2, 1).reshape(blocks * BLOCK_TOKENS, channels))
