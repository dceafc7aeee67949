"""Collects what a page about a bundle or a tuning log shows, and writes it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bertile import backends, loader
from bertile.base import machine
from bertile.base.errors import BundleError, UsageError
from bertile.base.progress import Progress
from bertile.report.content import Curve, Page
from bertile.schedules.task import Task
from bertile.tune.log import log_commands
from bertile.tune.log.tuning_log import Record, TuningLog


def write(
    source: Path,
    output: Path,
    *,
    measure: bool = True,
    log_dir: str | None = None,
    batch: int = 1,
    length: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the page about a bundle with the records of its kernels, or about a log directory.

    The kernels of a bundle are measured here unless `measure` is false. Gives "output", "tasks"
    (that were tuned), "kernels" and "bytes".
    """
    from bertile.report.page import html

    progress = progress or Progress(verbosity=-1)
    if (source / loader.MANIFEST).exists():
        log = TuningLog.open(log_dir, progress.say)
        page = _of_bundle(source, log, measure, batch, length, threads, progress)
    else:
        page = _of_log(source, progress)
    text = html(page)
    beside = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(output)
    finally:
        beside.unlink(missing_ok=True)
    return {
        "output": str(output),
        "tasks": len(page.curves),
        "kernels": len(page.kernels),
        "bytes": len(text.encode()),
    }


def curves(
    log: TuningLog, target: str | None = None, calls: dict[Task, int] | None = None
) -> tuple[Curve, ...]:
    """A curve per task, processor and number of threads; `calls` limits them to a model's tasks."""
    all_curves, groups = [], list(log_commands.groups(log, target))
    processors: dict[Task, set[str]] = defaultdict(set)
    for group in groups:
        processors[group.task].add(group.processor)
    # the model's own spelling of a shape, whatever order the log has its keys in
    spelt = {task: task.name for task in calls or ()}
    for name, processor, threads, task, records in groups:
        if calls is not None and task not in calls:
            continue
        ordered = sorted(records, key=lambda record: record.time)
        measured = [record for record in ordered if record.microseconds]
        best = min(measured, key=lambda record: record.median, default=None)
        all_curves.append(
            Curve(
                name=(spelt.get(task) or f"{task.name}, {name}")
                + (f", {processor}" if len(processors[task]) > 1 else ""),
                threads=threads,
                trials=tuple(record.median if record.microseconds else None for record in ordered),
                default=_default(task, name, threads, measured),
                best=best.median if best else None,
                knobs=dict(best.knobs) if best else {},
                calls=calls[task] if calls is not None else None,
                machine=_machine(records),
                when=_days(records),
            )
        )
    return tuple(all_curves)


def _of_bundle(
    directory: Path,
    log: TuningLog,
    measure: bool,
    batch: int,
    length: int | None,
    threads: int | None,
    progress: Progress,
) -> Page:
    manifest = loader.read_manifest(directory)
    model, versions = manifest["model"], manifest["versions"]
    calls = {
        Task(kernel["operation"], kernel["shape"]): kernel["calls"]
        for kernel in manifest["kernels"]
        if kernel["operation"] != "generic"
    }
    facts = {
        "model": f"{model['source']} ({model['family']}, {model['head']})",
        "target": manifest["target"]["name"],
        "versions": ", ".join(f"{name} {versions[name]}" for name in ("tvm", "llvm", "python")),
    }
    kernels: Sequence[dict[str, Any]] = ()
    notes = []
    backend = backends.of_bundle(manifest)
    inspected = backend.inspect(directory, batch, length, threads, progress, measure)
    if inspected and "peak_gflops" not in inspected:
        notes.append(backend.summary(inspected))
    elif inspected:
        kernels = inspected["kernels"]
        facts["kernels timed on"] = machine.cpu_name()
        facts["request"] = f"{batch} x {inspected['length']} tokens, {inspected['threads']} threads"
        facts["time"] = f"{inspected['total_ms']:.2f} ms a request"
        facts["peak"] = f"{inspected['peak_gflops']:.0f} GFLOP/s, measured in the same run"
        between = max(0.0, inspected["between_kernels_ms"])
        notes.append(
            f"Between the kernels: {between:.2f} ms. A kernel measured by itself also pays for the"
            " clock that measures it."
        )
    tuned = curves(log, manifest["target"]["name"], calls)
    if threads is not None and any(curve.threads == threads for curve in tuned):
        tuned = tuple(curve for curve in tuned if curve.threads == threads)
    if tuned:
        facts["tuned on"] = "; ".join(dict.fromkeys(curve.machine for curve in tuned))
    return Page(
        title=f"Bertile: {model['source']}",
        facts=facts,
        curves=tuned,
        kernels=tuple(kernels),
        fallthrough=tuple(manifest["fallthrough"]),
        notes=tuple(notes),
    )


def _of_log(directory: Path, progress: Progress) -> Page:
    if not directory.is_dir():
        raise BundleError(f"there is no bundle and no log '{directory}'")
    of_one_target = any(directory.glob("*.jsonl"))  # one target's part of a log
    log = TuningLog([directory.parent if of_one_target else directory], progress.say)
    names = [directory.name] if of_one_target else log.targets()
    records = [record for name in names for record in log.all_records(name)]
    if not records:
        raise UsageError(
            f"'{directory}' is neither a bundle nor a tuning log",
            "give a directory that `bertile compile` or `bertile tune` has written",
        )
    drawn = tuple(curve for name in names for curve in curves(log, name))
    return Page(f"Bertile: {directory.name}", _log_facts(records), drawn)


def _machine(records: Sequence[Record]) -> str:
    """The machine of the records of a curve, which all have the same processor."""
    facts = records[-1].machine
    name = str(facts.get("gpu") or facts.get("cpu") or "an unknown machine")
    return f"{name}, by estimate" if all(record.estimated for record in records) else name


def _days(records: Sequence[Record]) -> str:
    days = sorted({record.time[:10] for record in records})
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


def _log_facts(records: Sequence[Record]) -> dict[str, str]:
    def distinct(values: Any) -> str:
        return ", ".join(sorted({str(value) for value in values}))

    return {
        "target": distinct(record.target for record in records),
        "processor": distinct(record.machine.get("cpu", "unknown") for record in records),
        "TVM": distinct(record.versions.get("apache-tvm", "unknown") for record in records),
        "records": f"{len(records)}, of which {sum(not r.microseconds for r in records)} failed",
        "from": min(record.time for record in records),
        "to": max(record.time for record in records),
    }


def _default(task: Task, target: str, threads: int, measured: Sequence[Record]) -> float | None:
    """Microseconds of the schedule's default, where it is known and was measured."""
    from bertile.schedules import schedules_for
    from bertile.targets import rows as targets

    rows = [row for row in targets.TABLE if row.log == target]
    schedules = schedules_for(rows[0]) if rows else {}
    if task.operation not in schedules:
        return None
    try:
        row = dataclasses.replace(rows[0], threads=threads)
        knobs = json.dumps(schedules[task.operation].default(task, row), sort_keys=True)
    except (KeyError, TypeError, ValueError):  # a shape of another version's schedule
        return None
    same = [
        record.median
        for record in measured
        if json.dumps(dict(record.knobs), sort_keys=True) == knobs
    ]
    return min(same, default=None)
