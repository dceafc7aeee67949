"""Holds what the page of a report shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Curve:
    """The tuning of one task on one number of threads."""

    name: str
    threads: int
    trials: tuple[float | None, ...]  # microseconds in the order of the log; None: failed
    default: float | None  # microseconds of the schedule's default, where it was measured
    best: float | None
    knobs: dict[str, Any]
    calls: int | None = None  # of one request; None where there is no bundle
    machine: str = ""  # that the trials ran on, or were estimated for
    when: str = ""  # the day of the trials, or the first and the last

    @property
    def best_so_far(self) -> tuple[tuple[int, float], ...]:
        """(trial number from 1, microseconds) wherever the best time improves."""
        steps: list[tuple[int, float]] = []
        for number, microseconds in enumerate(self.trials, 1):
            if microseconds is not None and (not steps or microseconds < steps[-1][1]):
                steps.append((number, microseconds))
        return tuple(steps)


@dataclass(frozen=True)
class Page:
    """What the page shows."""

    title: str
    facts: dict[str, str]
    curves: tuple[Curve, ...]
    kernels: tuple[dict[str, Any], ...] = ()
    fallthrough: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
