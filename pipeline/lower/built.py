"""Describes what a backend has built: code, weights, and where each kernel came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bertile.base import machine
from bertile.loader import LIBRARY
from bertile.lower.stages import StageEntry
from bertile.schedules.schedule import Knobs
from bertile.schedules.task import Task


@dataclass(frozen=True)
class Built:
    """The code of a bundle by the names of its files, the weights it wants, and where each kernel
    came from; `versions` of what has compiled it beside TVM. `stages` are the functions that
    run the model piece by piece.
    """

    files: dict[str, Path]
    params: dict[str, np.ndarray]
    kernels: list[dict[str, Any]]
    fallthrough: list[str]
    versions: dict[str, str] = field(default_factory=dict)
    stages: Sequence[StageEntry] = ()

    @property
    def library(self) -> Path:
        """The linked library of a bundle for a CPU."""
        return self.files[LIBRARY]


def kernel_entry(
    task: Task, calls: int, source: str, knobs: Knobs, record: Any = None
) -> dict[str, Any]:
    """What a manifest says of a kernel of ours; `record` is the log's, None of a default."""
    measured = (
        {"measured_on": machine.in_words(record.machine), "at": record.time} if record else {}
    )
    return {
        "name": task.name,
        "operation": task.operation,
        "shape": dict(task.shape),
        "provenance": source,
        **({"record": measured} if measured else {}),
        "calls": calls,
        "decisions": dict(knobs),
    }
