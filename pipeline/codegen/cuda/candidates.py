"""Compiles the kernel of a task and knobs for one kind of GPU."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from bertile.codegen.cuda import compiler
from bertile.schedules import schedules_for
from bertile.schedules.task import Task
from bertile.targets.rows import Target


def build(task: Task, knobs: Mapping[str, int], row: Target) -> bytes:
    """The cubin of a candidate; PlatformError where there is no compiler. Several threads may call
    it at once.
    """
    kernel = schedules_for(row)[task.operation].kernel(task, dict(knobs), row)
    return _compiler().run(compiler.prelude() + kernel.source, compiler.machine(row))


@lru_cache(maxsize=1)
def _compiler() -> compiler.Compiler:
    return compiler.find()
