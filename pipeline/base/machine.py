"""Tells which machine this is, and what else it does while something is measured."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BUSY_PERCENT = 10.0  # of the machine's CPU time in other hands: from here on it is worth a sentence


class Watch:
    """Measures, between its making and `busy`, how much CPU time other processes took."""

    def __init__(self, pids: Sequence[int] = (), root: Path = Path("/proc")):
        self._pids, self._root = (os.getpid(), *pids), root
        self._began = self._read()
        self._start = time.monotonic()

    def busy(self) -> dict[str, Any]:
        """What others took of the CPU time ("others_percent", None where unknown), and "load"."""
        load = [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else []
        return {"others_percent": self._others(), "load": load}

    def _others(self) -> float | None:
        now = self._read()
        if now is None or self._began is None:
            return None
        total, used, ours = (after - before for after, before in zip(now, self._began))
        return round(100 * max(0.0, used - ours) / total, 1) if total > 0 else None

    def _read(self) -> tuple[int, int, int] | None:
        """Ticks so far: of all cores, of them not idle, and of ours."""
        try:
            stat = (self._root / "stat").read_text(encoding="ascii")
            # user nice system idle iowait irq softirq steal; guest is in user already
            ticks = [int(word) for word in stat.split("\n", 1)[0].split()[1:9]]
            return sum(ticks), sum(ticks) - ticks[3] - ticks[4], sum(map(self._own, self._pids))
        except (OSError, ValueError, IndexError):
            return None

    def _own(self, pid: int) -> int:
        text = (self._root / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
        # behind the name, which may hold blanks: utime and stime are the fields 14 and 15
        fields = text.rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])


def busy_sentence(busy: dict[str, Any]) -> str:
    """How quiet the machine was, for a reader who weighs the numbers."""
    others, load = busy["others_percent"], ", ".join(map(str, busy["load"]))
    average = f" (load average {load})" if load else ""
    if others is None:
        return f"how busy the machine was is not known{average}"
    if others > BUSY_PERCENT:
        return (
            f"the machine was busy: other processes took {others:.0f}% of its CPU time{average};"
            " measure again when it is quiet"
        )
    return f"other processes took {others:.0f}% of the machine's CPU time{average}"


def cpu_name() -> str:
    """The processor as a person calls it, with the numbers that tell two of one name apart."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    pairs = [line.partition(":") for line in text.split("\n\n", 1)[0].splitlines()]
    fields = {name.strip(): value.strip() for name, _, value in pairs}
    family = ("cpu family", "model")
    parts = [fields.get("model name", ""), *(f"{part} {fields.get(part, '')}" for part in family)]
    return ", ".join(part for part in parts if part.strip() not in ("", *family))
