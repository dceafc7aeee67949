"""Times bundles and other engines as servers: several callers, mixed requests, a rate, a busy
machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bertile import loader
from bertile.base import machine
from bertile.base.errors import UsageError
from bertile.base.progress import Progress, default_progress
from bertile.bench import busy_cores, competitors, sameness, turns, workloads
from bertile.bench.engines import Engine
from bertile.bench.traffic import Served, Traffic
from bertile.bench.workloads import Mix, Workload
from bertile.run.requests import USUAL_LENGTH, usual_length

SLICE_SECONDS = 1.0  # of one engine's turn, where a run is measured in seconds
LOAD_LENGTH = 32  # tokens, where nobody says
LOAD_SECONDS = 5.0  # of each engine beside each kind of load, where nobody says
SETTLE_SECONDS = 0.5  # behind a call: threads that spin for a while have gone to sleep
PERCENTILES = (50, 90, 99)
WAIT_SECONDS = 2.0  # in which a waiting model burns processor time, or does not
ALONE = "{} is left out: it takes requests of one size, from one caller"


class Load(NamedTuple):
    """What else the machine does meanwhile: so many cores count (None: all), and whether a second
    process of the same engine gets the same requests.
    """

    name: str
    busy: int | None = 0
    twin: bool = False


IDLE = Load("nothing")
LOADS = (
    IDLE,
    Load("one busy core", 1),
    Load("all cores busy", None),
    Load("a second process", twin=True),
)


@dataclass(frozen=True)
class Service:
    """How engines are called.

    `batches` of `lengths` (tokens; none: of the `usual` one, or as many as the model takes), or of
    a `mix` of lengths, or what the file `source` holds.
    `streams` are the numbers of calls answered at once that are compared; the threads are divided
    among them. `callers` None: as many as streams. `rate`: requests a second that fall due,
    answered or not. Each engine is called for `seconds`, or `repeat` times where that is None.
    """

    batches: Sequence[int] = (1,)
    lengths: Sequence[int] = ()
    usual: int = USUAL_LENGTH
    mix: Mix | None = None
    source: Path | None = None
    streams: Sequence[int] = (1,)
    callers: int | None = None
    rate: float | None = None
    seconds: float | None = None
    repeat: int = 30
    loads: Sequence[Load] = (IDLE,)

    def __post_init__(self) -> None:
        for what in ("batches", "lengths", "streams"):
            _above_zero(what, *getattr(self, what))
        _above_zero("repeat", self.repeat)
        for what in ("callers", "rate", "seconds"):
            _above_zero(what, *[value for value in [getattr(self, what)] if value is not None])
        if self.mix and self.source:
            raise UsageError("the lengths of --input are those of its texts", "leave out --lengths")

    def callers_of(self, engine: Engine) -> int:
        """How many call an engine at once."""
        return self.callers or engine.streams

    def slices(self, callers: int) -> list[dict[str, Any]]:
        """The turns of one engine: fields of a `Traffic`."""
        if self.seconds is not None:
            count = math.ceil(self.seconds / SLICE_SECONDS)
            return [{"seconds": self.seconds / count}] * count
        step = turns.TURN * callers
        return [{"count": min(step, self.repeat - done)} for done in range(0, self.repeat, step)]


def _above_zero(what: str, *values: float) -> None:
    for value in values:
        if not 0 < value < math.inf:
            raise UsageError(f"{what} is {value}", "give a number above 0")


def bench(
    directory: Path,
    onnx: Path | None = None,
    *,
    service: Service,
    against: Sequence[str] = ("onnxruntime",),
    threads: int | None = None,
    cache_dir: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Call the bundle and each engine of `against` as `service` says, in turns.

    `onnx` and `threads` are those of `benchmark.bench`. Gives "rows", one per engine, number of
    streams, kind of request and load: "calls_per_s", percentiles of the latency in milliseconds
    (from the moment that a request was due), "cores" (processor seconds a second); ratios are
    Bertile's divided by the engine's. And "waiting": the processor seconds a second of each engine
    that is loaded, warm, and not asked.
    """
    _above_zero("threads", *([] if threads is None else [threads]))
    progress = progress or default_progress()
    manifest = loader.read_manifest(directory)
    threads = threads or loader.available_cores()
    for streams in service.streams:
        if streams > threads:
            raise UsageError(
                f"{streams} streams are more than the {threads} threads that they share",
                "give fewer streams, or more --threads",
            )
    loads = _workloads(Path(directory), manifest, service)
    engines, notes = competitors.engines(
        Path(directory), manifest, against, onnx, cache_dir, progress
    )
    notes += [ALONE.format(engine.name) for engine in engines if engine.kind == "deepsparse"]
    engines = [engine for engine in engines if engine.kind != "deepsparse"]
    variants = [
        dataclasses.replace(engine, streams=streams)
        for streams in service.streams
        for engine in engines
    ]
    inputs = [workload.requests[0] for workload in loads]
    references = sameness.references(engines, inputs, threads)
    rows: list[dict[str, Any]] = []
    busy: list[dict[str, Any]] = []
    with turns.started(variants, inputs[0], threads, cache_dir) as (workers, versions, left_out):
        same = [_compared(workers, *pair) for pair in zip(inputs, references)]
        for load in service.loads:
            with _beside(load, variants, inputs[0], threads, cache_dir) as (twins, pids):
                watch = machine.Watch([worker.pid for worker in (*workers, *twins)] + pids)
                for workload, outputs in zip(loads, same):
                    progress.status(f"bench     {workload.length} tokens beside {load.name}")
                    measured = _measure(workers, twins, workload, service)
                    rows += [
                        _row(worker, parts, workload, load, equal, service)
                        for worker, parts, equal in zip(workers, measured, outputs)
                    ]
                busy.append(watch.busy())
        waiting = _waiting(workers)
    doubts = [text for outputs in same for row in outputs if (text := sameness.doubt(row))]
    source = manifest["model"]["source"]
    return {
        "rows": [{"model": source, **row} for row in _with_ratios(rows)],
        "waiting": [{"model": source, **row} for row in waiting],
        "source": source,
        "versions": versions,
        "threads": threads,
        "repeat": service.repeat,
        "seconds": service.seconds,
        "rate": service.rate,
        "cpu": machine.cpu_name(),
        "busy": max(busy, key=lambda facts: facts["others_percent"] or 0),
        "notes": [*dict.fromkeys([*notes, *left_out, *doubts])],
        "time": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _workloads(directory: Path, manifest: dict[str, Any], service: Service) -> list[Workload]:
    if service.source:
        described = competitors.described(directory, manifest)
        return [workloads.of_file(service.source, described, batch) for batch in service.batches]
    if service.mix:
        return [workloads.of_mix(manifest, batch, service.mix) for batch in service.batches]
    return [
        workloads.of_size(manifest, batch, length)
        for batch in service.batches
        for length in service.lengths or [usual_length(manifest, service.usual)]
    ]


def _compared(
    workers: Sequence[Any], inputs: Any, reference: sameness.Outputs | None
) -> list[dict[str, Any]]:
    """Of each worker, what its outputs have in common with float32's, or with Bertile's."""
    outputs = [worker.outputs(inputs) for worker in workers]
    reference = reference or outputs[0]
    return [
        {
            "engine": worker.name,
            "precision": worker.engine.precision,
            **sameness.compared(reference, answer, inputs),
        }
        for worker, answer in zip(workers, outputs)
    ]


@contextlib.contextmanager
def _beside(
    load: Load, engines: Sequence[Engine], inputs: Any, threads: int, cache_dir: str | None
) -> Iterator[tuple[list[Any], list[int]]]:
    """The second processes of the engines, if there are any, and the ids of those that count."""
    with contextlib.ExitStack() as stack:
        twins: list[Any] = []
        if load.twin:
            twins, _, _ = stack.enter_context(turns.started(engines, inputs, threads, cache_dir))
        pids = stack.enter_context(busy_cores.busy(busy_cores.cores()[: load.busy]))
        yield twins, pids


def _measure(
    workers: Sequence[Any], twins: Sequence[Any], workload: Workload, service: Service
) -> list[list[Served]]:
    """What came of the turns of each worker; a twin's answers count as its worker's."""
    requests, served = list(workload.requests), [[] for _ in workers]
    shapes = list(workload.of_each_shape)
    together = [
        [worker, *(twin for twin in twins if twin.engine == worker.engine)] for worker in workers
    ]
    plans = [service.slices(service.callers_of(worker.engine)) for worker in workers]
    for turn in range(max(map(len, plans))):
        for shift in range(len(workers)):
            number = (turn + shift) % len(workers)  # nobody always works behind the same engine
            if turn >= len(plans[number]):
                continue
            callers = service.callers_of(workers[number].engine)
            if turn == 0:  # every shape once: what a new one costs is no part of a latency
                for process in together[number]:
                    process.drive(shapes, Traffic(callers, count=len(shapes)))
            time.sleep(turns.PAUSE_SECONDS)
            first = sum(len(part.milliseconds) for part in served[number])
            traffic = Traffic(callers, rate=service.rate, first=first, **plans[number][turn])
            for process in together[number]:
                process.begin_drive(requests, traffic)
            served[number] += [process.receive() for process in together[number]]
    return served


def _row(
    worker: Any,
    parts: Sequence[Served],
    workload: Workload,
    load: Load,
    same: dict[str, Any],
    service: Service,
) -> dict[str, Any]:
    milliseconds = np.concatenate([part.milliseconds for part in parts])
    if not len(milliseconds):
        raise UsageError(
            f"no request fell due at a rate of {service.rate:g}", "give a longer --duration"
        )
    # two processes at once take the same seconds
    seconds = sum(part.seconds for part in parts) / (2 if load.twin else 1)
    calls = len(milliseconds) / seconds
    latencies = np.percentile(milliseconds, PERCENTILES)
    return {
        **same,
        "batch": workload.batch,
        "length": workload.length,
        "streams": worker.engine.streams,
        "callers": service.callers_of(worker.engine),
        "beside": load.name,
        "calls": len(milliseconds),
        "calls_per_s": calls,
        "tokens_per_s": calls * workload.tokens,
        **{f"p{percent}_ms": float(ms) for percent, ms in zip(PERCENTILES, latencies)},
        "cores": sum(part.cpu_seconds for part in parts) / seconds,
    }


def _with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with Bertile's figures divided by theirs, in the same circumstances."""
    same = ("batch", "length", "streams", "beside")
    ours = {tuple(row[name] for name in same): row for row in rows if row["engine"] == "bertile"}
    with_ratios = []
    for row in rows:
        mine = ours[tuple(row[name] for name in same)]
        ratios = {
            f"{name}_ratio": mine[name] / row[name] for name in ("p50_ms", "p99_ms", "calls_per_s")
        }
        with_ratios.append({**row, **ratios})
    return with_ratios


def _waiting(workers: Sequence[Any]) -> list[dict[str, Any]]:
    """Processor seconds a second of each engine, loaded and warm, that nobody calls."""
    time.sleep(SETTLE_SECONDS)
    began = time.perf_counter()
    before = [worker.cpu_seconds() for worker in workers]
    time.sleep(WAIT_SECONDS)
    after = [worker.cpu_seconds() for worker in workers]
    seconds = time.perf_counter() - began
    return [
        {
            "engine": worker.name,
            "precision": worker.engine.precision,
            "streams": worker.engine.streams,
            "cpu_per_s": (last - first) / seconds,
        }
        for worker, first, last in zip(workers, before, after)
    ]
