"""Counts the floating-point operations of a request, and measures the machine's limit."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

from bertile.base import tvm_alone
from bertile.base.errors import BertileError
from bertile.schedules.task import Task

Kernel = Mapping[str, Any]  # a row of the manifest's "kernels"


def flops(kernel: Kernel, tokens: int, batch: int, length: int) -> float:
    """Of one call of a kernel on that many tokens; attention works on `batch` sequences instead.

    A sparse kernel's are the multiply-adds that it does: zeros that it skips count nothing, zeros
    beside others in a lane do. What no schedule covers (a generic kernel) counts nothing.
    """
    from bertile.schedules.cpu import SCHEDULES
    from bertile.schedules.cpu.product import group

    task = Task(kernel["operation"], kernel["shape"])
    if task.operation not in SCHEDULES:
        return 0.0
    if "nonzeros" in kernel:
        return 2.0 * tokens * kernel["nonzeros"] * group(task)
    count = SCHEDULES[task.operation].flops
    return batch * count(task, length) if task.operation == "attention" else count(task, tokens)


def request_flops(kernels: Sequence[Kernel], batch: int, length: int) -> float:
    """Of a whole request without padding: what the model asks for, no tail of a block counted.

    Products behind the first_token kernel (a pooler, a classifier) see one token a sequence.
    """
    names = [kernel["operation"] for kernel in kernels]
    first = names.index("first_token") if "first_token" in names else len(names)
    total = 0.0
    for position, kernel in enumerate(kernels):
        tokens = batch if position > first else batch * length
        total += kernel["calls"] * flops(kernel, tokens, batch, length)
    return total


def peak(target: str, threads: int, precision: str = "fp32") -> float:
    """Measured GFLOP/s of this machine with the features of a target row."""
    from bertile.schedules.cpu.peak import peak_gflops

    row, tvm_row = _prepared(target, threads)
    return peak_gflops(tvm_row, row, threads, precision)


def bandwidths(target: str, threads: int, sizes: Sequence[int]) -> dict[int, float]:
    """Measured GB/s of reading so many bytes again and again, by size."""
    from bertile.schedules.cpu.peak import read_gbs

    row, tvm_row = _prepared(target, threads)
    return read_gbs(tvm_row, row, threads, sizes)


def _prepared(target: str, threads: int) -> tuple[Any, Any]:
    from bertile.loader import set_thread_defaults

    set_thread_defaults()  # before TVM starts its thread pool
    from bertile.targets.rows import resolve, tvm_target

    row = resolve(target, threads)
    use_threads(threads)
    return row, tvm_target(row)


def unit(kernel: Kernel, target: str) -> str:
    """What a kernel multiplies in, as ``peak`` takes it."""
    from bertile.schedules.cpu import attention_tiles, tiles
    from bertile.schedules.cpu.peak import TILES
    from bertile.targets.rows import resolve

    takes = {"dense": tiles.takes, "attention": attention_tiles.takes}.get(kernel["operation"])
    task = Task(kernel["operation"], kernel["shape"])
    name = str(task.shape.get("precision", "fp32")).removesuffix("_static")
    return name + TILES if takes and takes(task, resolve(target)) else name


def use_threads(threads: int) -> None:
    """Let TVM in this process work on that many threads, as the loader does."""
    import tvm

    # -3: as many threads as the list is long. Other modes stop at half the cores that x86 reports.
    cores = [str(core) for core in sorted(os.sched_getaffinity(0))[:threads]]
    tvm.get_global_func("runtime.config_threadpool")(-3, threads, cores)


def facts_in_own_process(
    kernels: Sequence[Kernel],
    target: str,
    threads: int,
    sizes: Sequence[tuple[int, int]],
    precisions: Sequence[str] = ("fp32",),
) -> tuple[dict[str, float], list[float]]:
    """The peak in each precision that the target has; the flops of a request of each size.

    `sizes` are (batch, length). TVM works in another process: its threads and a compiler's memory
    would stay behind for the rest of a benchmark.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(_facts, kernels, target, threads, sizes, precisions).result()
        except BrokenProcessPool as error:
            raise BertileError("the process that measures the machine's peak crashed") from error


def _facts(
    kernels: Sequence[Kernel],
    target: str,
    threads: int,
    sizes: Sequence[tuple[int, int]],
    precisions: Sequence[str],
) -> tuple[dict[str, float], list[float]]:
    tvm_alone.load()
    from bertile.targets.rows import resolve

    bf16 = resolve(target, threads).bf16
    able = [precision for precision in precisions if precision != "bf16" or bf16]
    layers = {each: {"operation": "dense", "shape": {"precision": each}} for each in able}
    peaks = {each: peak(target, threads, unit(layer, target)) for each, layer in layers.items()}
    return peaks, [request_flops(kernels, *size) for size in sizes]
