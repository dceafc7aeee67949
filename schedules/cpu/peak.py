"""The machine's limit for float32: multiply-adds on registers alone, every thread at once."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import tvm
from tvm.tirx.script import builder as T

from bertile.schedules.cpu import lanes
from bertile.schedules.schedule import Row

CHAINS = 12  # independent accumulators: more than latency × throughput of any core so far
STEPS = 3_000_000


def peak_gflops(target: tvm.target.Target, row: Row, threads: int) -> float:
    """Measured GFLOP/s (2 per multiply-add), best of a few runs of about 10 ms each."""
    chains = min(CHAINS, lanes.vector_capacity(row) - 2)
    mod = tvm.IRModule({"peak": _kernel(chains, threads).with_attr("global_symbol", "peak")})
    run = tvm.tirx.build(mod, target=target)["peak"]
    factors = tvm.runtime.tensor(np.full((2, lanes.LANES), 0.5, "float32"))
    out = tvm.runtime.tensor(np.zeros((threads, chains, lanes.LANES), "float32"))
    best = float("inf")
    for _ in range(9):
        began = time.perf_counter()
        run(factors, out)
        best = min(best, time.perf_counter() - began)
    return 2.0 * lanes.LANES * chains * STEPS * threads / best / 1e9


def _kernel(chains: int, threads: int) -> Any:
    with lanes.kernel("peak") as made:
        factors = made.tensor("factors", 2, lanes.LANES)
        out = made.tensor("out", threads, chains, lanes.LANES)
        with T.parallel(threads) as thread:
            total = lanes.registers(chains)
            for chain in range(chains):
                lanes.write(total[chain], lanes.splat(float(chain)))
            with T.serial(STEPS):
                for chain in range(chains):
                    value = lanes.read(total[chain]) * lanes.load(factors, 0)
                    lanes.write(total[chain], value + lanes.load(factors, 1))
            for chain in range(chains):
                lanes.store(out, lanes.read(total[chain]), thread, chain)
    return made.func
