"""A bundle in; its kernels with where each came from, its time, and its share of the machine's
peak, out.
"""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from bertile import loader, weights, work
from bertile.bench import random_inputs
from bertile.errors import require
from bertile.progress import Progress

RUNS = 20


def inspect(
    directory: Path,
    batch: int = 1,
    length: int = 128,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure every kernel of a bundle on random ids.

    "kernels" has a row each: "kernel", "origin" (tuned, default, generic), "calls", "ms" (of one
    request, all calls together), "time %", "GFLOP/s" and "peak %" (of what multiply-adds on
    registers alone reach in the same run). "fallthrough" names the operators that no schedule
    covers.
    """
    require("compile", "tvm")
    progress = progress or Progress(verbosity=-1)
    manifest = loader.read_manifest(directory)
    loader.check_platform(manifest["target"])
    loader.set_thread_defaults()
    threads = loader.thread_count(threads)
    with progress.stage("measure"):
        inputs = random_inputs(manifest, batch, length)
        times, tokens, total = _profile(Path(directory), manifest, inputs, threads)
        peak = work.peak(manifest["target"]["name"], threads)
    kernels = [
        _row(kernel, times, tokens, total, peak, batch, length) for kernel in manifest["kernels"]
    ]
    kernels.sort(key=lambda row: -row["ms"])
    return {
        "kernels": kernels,
        "fallthrough": manifest["fallthrough"],
        "batch": batch,
        "length": length,
        "threads": threads,
        "peak_gflops": peak,
        "total_ms": total * 1e3,
        "between_kernels_ms": (total - sum(times.values())) * 1e3,
    }


def _profile(
    directory: Path, manifest: dict[str, Any], inputs: dict[str, np.ndarray], threads: int
) -> tuple[dict[str, float], dict[str, int], float]:
    """Seconds of a request by kernel, lanes in the output of each, seconds of the whole request."""
    import tvm
    from tvm import relax

    vm = relax.VirtualMachine(tvm.runtime.load_module(str(directory / loader.LIBRARY)), tvm.cpu())
    params = weights.read(directory / loader.WEIGHTS)
    mask = np.ones_like(next(iter(inputs.values())))
    blocks = loader.token_blocks(mask, manifest["lanes"]).astype("int32")
    arrays = [*inputs.values(), blocks, *(params[name] for name in manifest["params"])]
    arguments = [tvm.runtime.tensor(array) for array in arrays]
    work.use_threads(threads)
    times: dict[str, list[float]] = defaultdict(list)
    tokens: dict[str, int] = {}
    began = 0.0

    def instrument(_func: Any, name: str, before: bool, _result: Any, *args: Any) -> None:
        nonlocal began
        if before:
            began = time.perf_counter()
            return
        times[name].append(time.perf_counter() - began)
        last = args[-1] if args else None
        if hasattr(last, "shape") and len(last.shape) == 3:
            tokens[name] = int(last.shape[0]) * manifest["lanes"]

    main = vm[manifest["entry"]]
    wholes = []
    for _ in range(RUNS):
        start = time.perf_counter()
        main(*arguments)
        wholes.append(time.perf_counter() - start)
    vm.set_instrument(instrument)
    for _ in range(RUNS):
        main(*arguments)
    names = {kernel["name"] for kernel in manifest["kernels"]}
    return (
        {name: _typical(found) for name, found in times.items() if name in names},
        tokens,
        float(np.median(wholes)),
    )


def _typical(found: list[float]) -> float:
    """Seconds of one request: the median over the requests of the sum over a kernel's calls."""
    return float(np.median(np.array(found).reshape(RUNS, -1).sum(1)))


def _row(
    kernel: dict[str, Any],
    times: dict[str, float],
    tokens: dict[str, int],
    total: float,
    peak: float,
    batch: int,
    length: int,
) -> dict[str, Any]:
    seconds = times.get(kernel["name"], 0.0)
    speed = 0.0
    if kernel["operation"] != "generic" and seconds:
        seen = tokens.get(kernel["name"], batch * length)
        speed = work.flops(kernel, seen, batch, length) * kernel["calls"] / seconds / 1e9
    return {
        "kernel": kernel["name"],
        "origin": kernel["provenance"],
        "calls": kernel["calls"],
        "ms": seconds * 1e3,
        "time %": round(100 * seconds / total, 1),
        "GFLOP/s": round(speed, 1) if speed else None,
        "peak %": round(100 * speed / peak, 1) if speed else None,
    }
