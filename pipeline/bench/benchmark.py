"""Times bundles or models beside other engines, in turns and in one run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bertile import loader
from bertile.base import machine, scratch
from bertile.base.errors import UsageError
from bertile.base.progress import Progress, default_progress
from bertile.bench import competitors, sameness, turns, workloads
from bertile.bench.startup import startup as measure_startup
from bertile.bench.workloads import Mix
from bertile.config import Config
from bertile.numerics.precision import PRECISIONS
from bertile.run.requests import usual_length
from bertile.tune.measure import roofline

STARTUP_SIZE = (1, 128)  # of the call that a new process makes, where it is among those timed


def bench(
    directory: str | os.PathLike[str],
    onnx: str | os.PathLike[str] | None = None,
    *,
    against: Sequence[str] = ("onnxruntime",),
    batches: Sequence[int] = (1,),
    lengths: Sequence[int | Mix] = (),
    threads: int | None = None,
    repeat: int = 30,
    startup: bool = False,
    cache_dir: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time the bundle and each engine of `against` on the same random ids.

    No `lengths` are the usual one: 128 tokens, or as many as the model takes. A length in tokens
    has no padding; sequences of a `Mix` of lengths are padded to the longest.
    Each engine has a process of its own with `threads` cores, and they work in turns of some calls
    behind a warm-up. `onnx` None exports the bundle's source again, from the cache where it can.
    Gives "rows", one per engine and size, in milliseconds of a call: "ratio" is Bertile's median
    divided by the engine's, "best_ratio" (in Bertile's rows) by that of the fastest other library
    in its precision; "peak_percent" is the model's work, without the zeros that Bertile skips, over
    what the machine reached on registers alone in the engine's precision; "cosine" and
    "max_abs_difference" compare outputs with float32's. `startup` adds "startup", rows on new
    processes.
    """
    numbers = [length for length in lengths if not isinstance(length, Mix)]
    _check({"batch": batches, "length": numbers, "repeat": [repeat]})
    _check({} if threads is None else {"threads": [threads]})
    progress = progress or default_progress()
    directory, onnx = Path(directory), None if onnx is None else Path(onnx)
    manifest = loader.read_manifest(directory)
    threads = threads or loader.available_cores()
    lengths = lengths or [usual_length(manifest)]
    sizes = [(batch, length) for batch in batches for length in lengths]
    loads = [
        workloads.of_mix(manifest, batch, length)
        if isinstance(length, Mix)
        else workloads.of_size(manifest, batch, length)
        for batch, length in sizes
    ]
    inputs = [workload.requests[0] for workload in loads]
    engines, notes = competitors.engines(directory, manifest, against, onnx, cache_dir, progress)
    progress.status("bench     the machine's peaks")
    used = sorted({engine.precision for engine in engines} & set(PRECISIONS))
    pieces = sorted({size for workload in loads for size in workload.sizes})
    peaks, flops = roofline.facts_in_own_process(
        manifest["kernels"], "native", threads, pieces, used
    )
    flops_of = dict(zip(pieces, flops))
    references = sameness.references(engines, inputs, threads)
    rows: list[dict[str, Any]] = []
    with turns.started(engines, inputs[0], threads, cache_dir) as (workers, versions, left_out):
        watch = machine.Watch([worker.pid for worker in workers])
        for workload, reference in zip(loads, references):
            measured = turns.measure(workers, workload.requests[0], repeat, progress, reference)
            work = sum(flops_of[size] for size in workload.sizes)
            tokens = sum(batch * length for batch, length in workload.sizes)
            rows += [
                {**row, "length": workload.length, "tokens": tokens, "flops": work}
                for row in measured
            ]
        busy = watch.busy()
    # once more, for a machine that was busy the first time
    again, _ = roofline.facts_in_own_process((), "native", threads, (), used)
    peaks = {precision: max(peak, again[precision]) for precision, peak in peaks.items()}
    model = manifest["model"]["source"]
    doubts = [doubt for row in rows if (doubt := sameness.doubt(row))]
    report = {
        "rows": [{"model": model, **_shares(row, peaks)} for row in rows],
        "source": model,
        "versions": versions,
        "threads": threads,
        "repeat": repeat,
        "cpu": machine.cpu_name(),
        "peaks_gflops": peaks,
        "busy": busy,
        "notes": [*notes, *left_out, *doubts],
        "time": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    if startup:
        weights = manifest["files"][loader.WEIGHTS]["bytes"]
        ready = [engine for engine in engines if engine.name in versions]
        chosen = sizes.index(STARTUP_SIZE) if STARTUP_SIZE in sizes else 0
        first_results = measure_startup(
            ready, inputs[chosen], weights, threads, cache_dir, progress
        )
        size = {"batch": loads[chosen].batch, "length": loads[chosen].length}
        report["startup"] = [{"model": model, **size, **row} for row in first_results]
    return report


def bench_models(
    targets: Sequence[str],
    config: Config,
    progress: Progress,
    onnx: Path | None = None,
    measure: Callable[..., dict[str, Any]] | None = None,
    **choices: Any,
) -> list[dict[str, Any]]:
    """One report each for bundles and models; a model is compiled first, and nothing of it stays
    but the cache. `measure` makes a report of a bundle: `bench`, or what is called like it.
    """
    if onnx and len(targets) > 1:
        raise UsageError("--onnx is one model's", "name one bundle with it")
    for name in choices.get("against", ()):
        competitors.check(name)  # before the minutes that compiling may take
    reports = []
    for target in targets:
        with scratch.directory("bench-") as work_directory:
            directory = _bundle(target, config, Path(work_directory), progress)
            choices |= {"threads": config.threads, "cache_dir": config.cache_dir}
            reports.append((measure or bench)(directory, onnx, progress=progress, **choices))
    return reports


def _check(counts: dict[str, Sequence[int]]) -> None:
    for what, values in counts.items():
        for value in values:
            if value < 1:
                raise UsageError(f"{what} is {value}", "give a number above 0")


def _bundle(target: str, config: Config, work_directory: Path, progress: Progress) -> Path:
    """The bundle that `target` is, or one compiled from it."""
    path = Path(target)
    if (path / loader.MANIFEST).exists() or (path.is_dir() and not any(path.glob("*.json"))):
        return path
    from bertile import driver

    driver.compile(target, work_directory / "bundle", config, progress)
    return work_directory / "bundle"


def _shares(row: dict[str, Any], peaks: dict[str, float]) -> dict[str, Any]:
    """The row with its speed: "flops" and "tokens" of a request become those of a second."""
    counts = {name: value for name, value in row.items() if name not in ("flops", "tokens")}
    speed = row["flops"] / row["median_ms"] / 1e6
    tokens = row["tokens"] / row["median_ms"] * 1e3
    peak = peaks.get(row["precision"])
    share = 100 * speed / peak if peak else None
    return {**counts, "tokens_per_s": tokens, "gflops": speed, "peak_percent": share}
