"""A bundle or a model, and other engines, come in; their times, measured in turn in one run, go
out.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bertile import loader, machine, work
from bertile.config import Config
from bertile.engines import PEERS, Arrays, Source, Worker
from bertile.errors import BundleError, UsageError, nearest
from bertile.progress import Progress
from bertile.runner import max_tokens

# Calls that one engine makes before it is the next one's turn: few enough that all see the same
# weather on a shared machine.
TURN = 5
# Threads of the engine before still spin for a while; nobody starts beside them.
PAUSE_SECONDS = 0.05
# Far above what float32 sums in another order give, far below what other weights give.
SAME = 1e-2
DIFFERS = "{engine}'s outputs differ from Bertile's by {max_abs_difference:.2g}: not the same model"
NOT_TORCH = "torch is left out: {} is an ONNX file, and torch runs checkpoints"


def bench(
    directory: Path,
    onnx: Path | None = None,
    *,
    against: Sequence[str] = ("onnxruntime",),
    batches: Sequence[int] = (1,),
    lengths: Sequence[int] = (128,),
    threads: int | None = None,
    repeat: int = 30,
    cache_dir: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time the bundle and each engine of `against` on the same random ids, without padding.

    Each engine has a process of its own with `threads` cores, and they work in turns of some calls
    behind a warm-up. `onnx` None exports the bundle's source again, from the cache where it can.
    Gives "rows", one per engine and size, in milliseconds of a call: "ratio" is Bertile's median
    divided by the engine's, "best_ratio" (in Bertile's rows) by that of the fastest of the others;
    "peak_percent" is the model's work over what the machine reached on registers alone.
    """
    against = list(dict.fromkeys(name for name in against if name != "none"))
    counts = {"batch": batches, "length": lengths, "repeat": [repeat]}
    _check(against, counts | ({} if threads is None else {"threads": [threads]}))
    progress = progress or Progress(verbosity=-1)
    manifest = loader.read_manifest(directory)
    threads = threads or loader.available_cores()
    sizes = [(batch, length) for batch in batches for length in lengths]
    inputs = [random_inputs(manifest, *size) for size in sizes]
    against, notes = possible(against, manifest)
    where = source(Path(directory), manifest, against, onnx, cache_dir)
    progress.status("bench     the machine's peak")
    peak, flops = work.facts_in_own_process(manifest["kernels"], "native", threads, sizes)
    flops_of = dict(zip(sizes, flops))
    rows: list[dict[str, Any]] = []
    with _workers(["bertile", *against], where, threads) as workers:
        versions = {worker.name: worker.receive() for worker in workers}
        watch = machine.Watch([worker.pid for worker in workers])
        for arrays in inputs:
            rows += _measure(workers, arrays, repeat, progress)
        busy = watch.busy()
    # once more, for a machine that was busy the first time
    peak = max(peak, work.facts_in_own_process((), "native", threads, ())[0])
    notes += [DIFFERS.format(**row) for row in rows if not row["max_abs_difference"] <= SAME]
    rows = [_shares(row, flops_of[row["batch"], row["length"]], peak) for row in rows]
    return {
        "rows": [{"model": manifest["model"]["source"], **row} for row in rows],
        "source": manifest["model"]["source"],
        "versions": versions,
        "threads": threads,
        "repeat": repeat,
        "cpu": machine.cpu_name(),
        "peak_gflops": peak,
        "busy": busy,
        "notes": notes,
        "time": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def bench_models(
    targets: Sequence[str],
    config: Config,
    progress: Progress,
    onnx: Path | None = None,
    **choices: Any,
) -> list[dict[str, Any]]:
    """One report each for bundles and models; a model is compiled first, and nothing of it stays
    but the cache.
    """
    if onnx and len(targets) > 1:
        raise UsageError("--onnx is one model's", "name one bundle with it")
    reports = []
    for target in targets:
        with tempfile.TemporaryDirectory(prefix="bertile-bench-") as work_directory:
            directory = _bundle(target, config, Path(work_directory), progress)
            choices |= {"threads": config.threads, "cache_dir": config.cache_dir}
            reports.append(bench(directory, onnx, progress=progress, **choices))
    return reports


def random_inputs(manifest: dict[str, Any], batch: int, length: int) -> Arrays:
    """Seeded ids for every input of the manifest; no padding, as a full batch has none."""
    limit = max_tokens(manifest)
    if limit and length > limit:
        raise UsageError(f"length {length} is too much", f"the model takes at most {limit} tokens")
    random = np.random.default_rng(batch * 100003 + length)
    inputs = {}
    for spec in manifest["inputs"]:
        if spec["default"] is None:
            values = random.integers(0, spec["below"] or 2, (batch, length))
        else:
            values = np.full((batch, length), int(spec["default"] == "ones"))
        inputs[spec["name"]] = values.astype(spec["dtype"])
    return inputs


def _check(against: Sequence[str], counts: dict[str, Sequence[int]]) -> None:
    for name in against:
        if name not in PEERS:
            raise UsageError(f"engine '{name}' is unknown{nearest(name, (*PEERS, 'none'))}")
    for what, values in counts.items():
        for value in values:
            if value < 1:
                raise UsageError(f"{what} is {value}", "give a number above 0")


def possible(against: Sequence[str], manifest: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The engines that can run the bundle's model, and a sentence on each that cannot."""
    model = manifest["model"]["source"]
    if "torch" in against and str(model).endswith(".onnx"):
        return [name for name in against if name != "torch"], [NOT_TORCH.format(model)]
    return list(against), []


def source(
    directory: Path,
    manifest: dict[str, Any],
    against: Sequence[str],
    onnx: Path | None,
    cache_dir: str | None,
) -> Source:
    """What the engines read; BundleError where the model has changed since it was compiled."""
    model = manifest["model"]
    needs_file = any(name != "torch" for name in against)
    if against and not (onnx and "torch" not in against):
        from bertile import driver, model_files

        config = Config.from_dict({**manifest["config"], "cache_dir": cache_dir})
        if model_files.fingerprint(model["source"], config.head) != model["sha256"]:
            raise BundleError(
                f"'{model['source']}' has changed since {directory} was compiled from it",
                "compile it again",
            )
        if needs_file and not onnx:
            onnx = driver.export_cached(model["source"], config).onnx_path
    outputs = tuple(output["name"] for output in manifest["outputs"])
    return Source(directory, onnx and Path(onnx), model["source"], model["head"], outputs)


def _bundle(target: str, config: Config, work_directory: Path, progress: Progress) -> Path:
    """The bundle that `target` is, or one compiled from it."""
    path = Path(target)
    if (path / loader.MANIFEST).exists() or (path.is_dir() and not any(path.glob("*.json"))):
        return path
    from bertile import driver

    driver.compile(target, work_directory / "bundle", config, progress)
    return work_directory / "bundle"


@contextlib.contextmanager
def _workers(names: Sequence[str], source: Source, threads: int) -> Iterator[list[Worker]]:
    workers: list[Worker] = []
    try:
        for name in names:
            workers.append(Worker(name, source, threads))
        yield workers
    finally:
        for worker in workers:
            worker.close()


def _measure(
    workers: Sequence[Worker], inputs: Arrays, repeat: int, progress: Progress
) -> list[dict[str, Any]]:
    batch, length = next(iter(inputs.values())).shape
    outputs = {worker.name: worker.outputs(inputs) for worker in workers}
    times: dict[str, list[float]] = {worker.name: [] for worker in workers}
    for turn, done in enumerate(range(0, repeat, TURN)):
        progress.status(f"bench     {batch} x {length} tokens, call {done} of {repeat}")
        first = turn % len(workers)  # so that nobody always works behind the same engine
        for worker in (*workers[first:], *workers[:first]):
            time.sleep(PAUSE_SECONDS)
            times[worker.name] += worker.call(inputs, min(TURN, repeat - done))
    medians = {name: float(np.median(found)) for name, found in times.items()}
    ours = medians["bertile"]
    best = min((median for name, median in medians.items() if name != "bertile"), default=None)
    return [
        {
            "engine": name,
            "batch": batch,
            "length": length,
            "median_ms": medians[name],
            "p90_ms": float(np.quantile(found, 0.9)),
            "p99_ms": float(np.quantile(found, 0.99)),
            "ratio": ours / medians[name],
            "best_ratio": ours / best if name == "bertile" and best else None,
            "max_abs_difference": _difference(outputs["bertile"], outputs[name]),
        }
        for name, found in times.items()
    ]


def _shares(row: dict[str, Any], flops: float, peak: float) -> dict[str, Any]:
    speed = flops / row["median_ms"] / 1e6
    tokens = row["batch"] * row["length"] / row["median_ms"] * 1e3
    return {**row, "tokens_per_s": tokens, "gflops": speed, "peak_percent": 100 * speed / peak}


def _difference(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))
