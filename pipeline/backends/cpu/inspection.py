"""Measures each kernel of a bundle: its time, and its share of the machine's peak."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bertile import loader
from bertile.base import machine, tvm_alone
from bertile.base.progress import Progress
from bertile.bundle import safetensors as weights
from bertile.run.requests import random_inputs, usual_length
from bertile.tune.measure import roofline

RUNS, LEAST_RUNS = 20, 3
SECONDS = 10.0  # after which no more than the least are made: a request may take many
MEMORY_BYTES = 256 << 20  # more than any cache holds


def inspect(
    directory: Path,
    batch: int = 1,
    length: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure every kernel of a bundle on random ids, `length` None on as many as are usual.

    "kernels" has a row each: "kernel", "origin" (tuned, default, generic), "calls", "ms" (of one
    request, all calls together), "time %", "GFLOP/s" and "peak %" (of what multiply-adds of the
    kernel's precision on registers alone reach in the same run). "bound" is what the kernel cannot
    be faster than, "arithmetic" or "bandwidth" (each byte once, activations as fast as the cache
    that holds them is read, weights as fast as memory), and "bound %" how near it comes.
    "fallthrough" names the operators that no schedule covers. "busy" says how much of the processor
    others took meanwhile, as `machine.Watch` does.
    """
    manifest = loader.read_manifest(directory)
    tvm_alone.load()
    progress = progress or Progress(verbosity=-1)
    loader.check_platform(manifest["target"])
    loader.set_thread_defaults()
    threads = loader.thread_count(threads)
    length = length or usual_length(manifest)
    watch = machine.Watch()
    with progress.stage("measure"):
        inputs = random_inputs(manifest, batch, length)
        seen, total = _profile(Path(directory), manifest, inputs, threads)
        limits = _limits(manifest, seen, threads)
    target = manifest["target"]["name"]
    kernels = [
        _row(kernel, seen.get(kernel["name"], _Seen()), total, limits, batch, length, target)
        for kernel in manifest["kernels"]
    ]
    kernels.sort(key=lambda row: -row["ms"])
    return {
        "kernels": kernels,
        "fallthrough": manifest["fallthrough"],
        "batch": batch,
        "length": length,
        "threads": threads,
        "peak_gflops": limits.peaks["fp32"],
        "peaks_gflops": limits.peaks,
        "memory_gbs": limits.memory,
        "busy": watch.busy(),
        "total_ms": total * 1e3,
        "between_kernels_ms": (total - sum(kernel.seconds for kernel in seen.values())) * 1e3,
    }


@dataclass
class _Seen:
    """One request's calls of a kernel: seconds of all, then lanes and bytes of one call."""

    seconds: float = 0.0
    tokens: int = 0
    weights: int = 0
    activations: int = 0


@dataclass(frozen=True)
class _Limits:
    """GFLOP/s by precision, GB/s of memory, and GB/s of the cache by bytes."""

    peaks: dict[str, float]
    memory: float
    caches: dict[int, float]

    def bytes_seconds(self, seen: _Seen) -> float:
        """How long a kernel's bytes take to read."""
        cache = self.caches[_rounded(seen.activations)]
        return (seen.weights / self.memory + seen.activations / cache) / 1e9


def _limits(manifest: dict[str, Any], seen: dict[str, _Seen], threads: int) -> _Limits:
    target = manifest["target"]["name"]
    units = {roofline.unit(kernel, target) for kernel in manifest["kernels"]} | {"fp32"}
    peaks = {unit: roofline.peak(target, threads, unit) for unit in sorted(units)}
    sizes = sorted({_rounded(kernel.activations) for kernel in seen.values()} | {_rounded(0)})
    bandwidths = roofline.bandwidths(target, threads, [*sizes, MEMORY_BYTES])
    return _Limits(peaks, bandwidths.pop(MEMORY_BYTES), bandwidths)


def _rounded(size: int) -> int:
    """The next power of two, from 64 KiB on."""
    return 1 << max(16, (size - 1).bit_length())


def _profile(
    directory: Path, manifest: dict[str, Any], inputs: dict[str, np.ndarray], threads: int
) -> tuple[dict[str, _Seen], float]:
    """What was seen of each kernel, and the seconds of a whole request."""
    import tvm
    from tvm import relax

    vm = relax.VirtualMachine(tvm.runtime.load_module(str(directory / loader.LIBRARY)), tvm.cpu())
    params = weights.read(directory / loader.WEIGHTS)
    mask = np.ones_like(next(iter(inputs.values())))
    blocks = loader.token_blocks(mask, manifest["lanes"]).astype("int32")
    packed = [tvm.runtime.tensor(params[name]) for name in manifest["params"]]
    arguments = [*(tvm.runtime.tensor(a) for a in (*inputs.values(), blocks)), *packed]
    roofline.use_threads(threads)
    stored = {tensor.data_ptr() for tensor in packed}
    times: dict[str, list[float]] = defaultdict(list)
    seen: dict[str, _Seen] = {}
    began = 0.0

    def instrument(_func: Any, name: str, before: bool, _result: Any, *args: Any) -> None:
        nonlocal began
        if before:
            began = time.perf_counter()
            return
        times[name].append(time.perf_counter() - began)
        if name not in seen:
            seen[name] = _sizes(args, stored, manifest["lanes"])

    main = vm[manifest["entry"]]
    wholes: list[float] = []
    while len(wholes) < LEAST_RUNS or (len(wholes) < RUNS and sum(wholes) < SECONDS):
        start = time.perf_counter()
        main(*arguments)
        wholes.append(time.perf_counter() - start)
    vm.set_instrument(instrument)
    for _ in wholes:
        main(*arguments)
    names = {kernel["name"] for kernel in manifest["kernels"]} & set(seen)
    for name in names:
        seen[name].seconds = _typical(times[name], len(wholes))
    return {name: seen[name] for name in names}, float(np.median(wholes))


def _sizes(args: Sequence[Any], stored: set[int], block_tokens: int) -> _Seen:
    """Tokens and bytes of one call, from its tensors."""
    tensors = [arg for arg in args if hasattr(arg, "data_ptr")]
    seen = _Seen()
    for tensor in tensors:
        size = int(np.prod(tensor.shape)) * np.dtype(str(tensor.dtype)).itemsize
        if tensor.data_ptr() in stored:
            seen.weights += size
        else:
            seen.activations += size
    if tensors and len(tensors[-1].shape) == 3:
        seen.tokens = int(tensors[-1].shape[0]) * block_tokens
    return seen


def _typical(seconds: list[float], runs: int) -> float:
    """Seconds of one request: the median over the requests of the sum over a kernel's calls."""
    return float(np.median(np.array(seconds).reshape(runs, -1).sum(1)))


def _row(
    kernel: dict[str, Any],
    seen: _Seen,
    total: float,
    limits: _Limits,
    batch: int,
    length: int,
    target: str,
) -> dict[str, Any]:
    row = {
        "kernel": kernel["name"],
        "origin": kernel["provenance"],
        "calls": kernel["calls"],
        "ms": seen.seconds * 1e3,
        "time %": round(100 * seen.seconds / total, 1),
    }
    known = dict.fromkeys(("GFLOP/s", "peak %", "bound", "bound %"))
    if kernel["operation"] != "generic" and seen.seconds:
        each = seen.seconds / kernel["calls"]
        tokens = seen.tokens or batch * length
        flops = roofline.flops(kernel, tokens, batch, length)
        if kernel["operation"] == "embedding":  # reads some rows of its tables, as wide as y
            seen = replace(seen, weights=seen.activations)
        bounds = {
            "arithmetic": flops / limits.peaks[roofline.unit(kernel, target)] / 1e9,
            "bandwidth": limits.bytes_seconds(seen),
        }
        bound = max(bounds, key=lambda name: bounds[name])
        known |= {"bound": bound, "bound %": round(100 * bounds[bound] / each, 1)}
        if flops:
            known["GFLOP/s"] = round(flops / each / 1e9, 1)
            known["peak %"] = round(100 * bounds["arithmetic"] / each, 1)
    return row | known
