"""Measures the machine's limits: multiply-adds on registers alone, and bytes read, every thread at
once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import tvm
from tvm import tirx
from tvm.tirx.script import builder as T

from bertile.schedules import BLOCK_TOKENS
from bertile.schedules.cpu import lanes, precisions
from bertile.schedules.cpu.arithmetic import Arithmetic
from bertile.schedules.cpu.precisions import arithmetic
from bertile.schedules.intrinsics import amx
from bertile.schedules.schedule import Row

CHAINS = 12  # independent accumulators: more than latency × throughput of any core so far
STEPS = 3_000_000
TILES = " in tiles"
TILE_STEPS = 500_000
RUNS = 9
READ_SECONDS = 0.01  # of one run


def peak_gflops(
    target: tvm.target.Target, row: Row, threads: int, precision: str = "fp32"
) -> float:
    """Measured GFLOP/s (2 per multiply-add), best of a few runs of about 10 ms each.

    ``precision`` is that of registers, or with TILES behind it that of tiles. Bytes have one peak,
    of weights that they are multiplied fastest by.
    """
    name, tiled, _ = precision.partition(TILES)
    if tiled:
        return _tiles_gflops(target, threads, precisions.PRECISIONS[name].group)
    math = arithmetic("int8_bounded" if precision == "int8" else precision, row)
    chains = min(CHAINS, lanes.vector_capacity(row) - 2)
    run = _built(_multiply_adds(math, chains, threads), target)
    rows = np.full((max(2, math.run), BLOCK_TOKENS), 0.5, "float32")
    factors = tvm.runtime.tensor(rows.view(math.lane))
    out = tvm.runtime.tensor(np.zeros((threads, chains, BLOCK_TOKENS), math.total))
    seconds = _best(run, [factors, out])
    # of a matrix two outputs at once, or as many lanes as a run has
    products = BLOCK_TOKENS * math.group * math.together * chains * STEPS * threads
    return 2.0 * products / seconds / 1e9


def _tiles_gflops(target: tvm.target.Target, threads: int, group: int) -> float:
    run = _built(_tile_products(group, threads), target)
    seconds = _best(run, [tvm.runtime.tensor(np.zeros((threads, BLOCK_TOKENS), "float32"))])
    lanes_ = len(amx.SUMS) * amx.ROWS**2 * BLOCK_TOKENS  # multiplied at each step
    return 2.0 * lanes_ * group * TILE_STEPS * threads / seconds / 1e9


def _tile_products(group: int, threads: int) -> Any:
    """Products of tiles of zeros, as kernels do them: two of weights by two of inputs."""
    with lanes.kernel("peak") as builder:
        out = builder.tensor("out", threads, BLOCK_TOKENS)
        builder.link(amx.TILES)
        with T.parallel(threads) as thread:
            words = ["tiles_open", *(f"tile_zero{c}" for c in amx.SUMS)]
            for word in words:
                T.evaluate(tirx.call_extern("int32", f"bertile_{word}"))
            with T.serial(TILE_STEPS):
                for c in amx.SUMS:
                    word = f"tile_dot{group}_{c}_{amx.WEIGHTS[c // 2]}_{amx.INPUTS[c % 2]}"
                    T.evaluate(tirx.call_extern("int32", f"bertile_{word}"))
            T.evaluate(tirx.call_extern("int32", "bertile_tiles_close"))
            lanes.store(out, lanes.splat(1.0), thread)
    return builder.func


def read_gbs(
    target: tvm.target.Target, row: Row, threads: int, sizes: Sequence[int]
) -> dict[int, float]:
    """Measured GB/s of reading so many bytes again and again: what the cache that holds them gives,
    or the memory.
    """
    run = _built(_reads(threads), target)
    speeds = {}
    for size in sizes:
        vectors = max(8, size // threads // (4 * BLOCK_TOKENS) // 8 * 8)
        data = tvm.runtime.tensor(np.ones((threads, vectors, BLOCK_TOKENS), "float32"))
        out = tvm.runtime.tensor(np.zeros((threads, BLOCK_TOKENS), "float32"))
        touched = 4 * threads * vectors * BLOCK_TOKENS
        times = max(1, int(READ_SECONDS * 50e9 / touched))
        speeds[size] = touched * times / _best(run, [data, times, out]) / 1e9
    return speeds


def _built(func: Any, target: tvm.target.Target) -> Any:
    mod = tvm.IRModule({"peak": func.with_attr("global_symbol", "peak")})
    return tvm.tirx.build(mod, target=target)["peak"]


def _best(run: Any, arguments: list[Any]) -> float:
    best = float("inf")
    for _ in range(RUNS):
        began = time.perf_counter()
        run(*arguments)
        best = min(best, time.perf_counter() - began)
    return best


def _multiply_adds(math: Arithmetic, chains: int, threads: int) -> Any:
    with lanes.kernel("peak") as builder:
        factors = builder.tensor("factors", max(2, math.run), BLOCK_TOKENS, dtype=math.lane)
        out = builder.tensor("out", threads, chains, BLOCK_TOKENS, dtype=math.total)
        builder.link(math.matrix or math.llvm)
        with T.parallel(threads) as thread:
            total = lanes.registers(chains, dtype=math.total)
            for chain in range(chains):
                lanes.write(
                    total[chain], tirx.Broadcast(tirx.const(chain, math.total), BLOCK_TOKENS)
                )
            with T.serial(STEPS):
                for chain in range(chains):
                    lanes.write(total[chain], _step(math, lanes.read(total[chain]), factors))
            for chain in range(chains):
                lanes.store(out, lanes.read(total[chain]), thread, chain)
    return builder.func


def _step(math: Arithmetic, total: Any, factors: Any) -> Any:
    a, b = lanes.load(factors, 0), lanes.load(factors, 1)
    if math.matrix:
        return math.multiply_matrix(total, a, factors[1, tirx.Ramp(0, 1, 4)])
    # where a product is an instruction of its own, what it multiplies changes at each step, so that
    # LLVM finds nothing to take out of the loop
    if math.run > 1:
        others = [lanes.load(factors, i) for i in range(math.run)]
        return math.multiply_run(total, [total] * math.run, others)
    if math.pairs:
        return math.multiply_add(total, total, b)
    return total * a + b if math.group == 1 else math.multiply_add(total, a, b)


def _reads(threads: int) -> Any:
    with lanes.kernel("peak") as builder:
        vectors = T.int32()
        data = builder.tensor("data", threads, vectors, BLOCK_TOKENS)
        times = T.arg("times", T.int32())
        out = builder.tensor("out", threads, BLOCK_TOKENS)
        with T.parallel(threads) as thread:
            total = lanes.registers(8)
            for register in total:
                lanes.write(register, lanes.splat(0.0))
            with T.serial(times), T.serial(vectors // 8) as i:
                for j, register in enumerate(total):
                    lanes.write(
                        register, lanes.read(register) + lanes.load(data, thread, 8 * i + j)
                    )
            result = lanes.read(total[0])
            for register in total[1:]:
                result = result + lanes.read(register)
            lanes.store(out, result, thread)
    return builder.func
