"""Makes records of a tuning log."""

from __future__ import annotations

from bertile.schedules.cpu import SCHEDULES
from bertile.schedules.task import Task
from bertile.targets.rows import native
from bertile.tune.log import chooser
from bertile.tune.log.tuning_log import Record

ROW = native()


def record(of: Task, tvm: str | None = None, **knobs: int) -> Record:
    return Record(
        operation=of.operation,
        shape=dict(of.shape),
        target=ROW.log,
        threads=ROW.threads,
        tokens=128,
        knobs={**SCHEDULES[of.operation].default(of, ROW), **knobs},
        microseconds=(5.0,),
        machine={},
        versions={"apache-tvm": tvm or chooser.version("apache-tvm")},
        time="2026-01-01T00:00:00+00:00",
    )
