"""Tells which machine this is, and what else it does while something is measured."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# What /proc/cpuinfo numbers processors by: those of x86, and those of ARM.
_NUMBERS = ("cpu family", "model", "CPU implementer", "CPU part")
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


def processor() -> dict[str, str]:
    """What a time depends on: the processor's name with its numbers, and its caches as a thread
    sees them.
    """
    facts = {"cpu": cpu_name(), "caches": _caches()}
    return {name: text for name, text in facts.items() if text}


def same_processor(machine: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether times of two machines can be compared: the same maker, family, model and caches.

    Caches that one of them does not know say nothing, since older records have none.
    """
    caches = {facts["caches"] for facts in (machine, other) if facts.get("caches")}
    return identity(machine) == identity(other) and len(caches) < 2


def identity(machine: Mapping[str, Any]) -> tuple[str, int, int]:
    """The maker, family and model of a processor by its name (of a GPU, its name alone).

    Names differ with what a hypervisor shows, the numbers do not.
    """
    name = str(machine.get("gpu") or machine.get("cpu") or "")
    numbers = re.search(r"(?:cpu family|CPU implementer) (\w+), (?:model|CPU part) (\w+)", name)
    if numbers is None:
        return name, 0, 0
    makers = ("AMD", "Intel", "Hygon")
    maker = next((maker for maker in makers if maker in name), "")
    return maker, int(numbers[1], 0), int(numbers[2], 0)


def in_words(machine: Mapping[str, Any]) -> str:
    """A processor's maker with its numbers, in few words; its name where it has none."""
    maker, family, model = identity(machine)
    return f"{maker} family {family} model {model}" if family else maker


def cpu_name() -> str:
    """The processor as a person calls it, with the numbers that tell two of one name apart."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    pairs = [line.partition(":") for line in text.split("\n\n", 1)[0].splitlines()]
    fields = {name.strip(): value.strip() for name, _, value in pairs}
    numbers = [name for name in _NUMBERS if fields.get(name)]
    parts = [fields.get("model name", ""), *(f"{name} {fields[name]}" for name in numbers)]
    return ", ".join(part for part in parts if part)


def _caches(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> str:
    """Sizes of the first processor's caches, the nearest first; "" where nothing tells."""
    sizes = []
    try:
        for index in sorted(root.glob("index*")):
            level, kind, size = (
                (index / name).read_text(encoding="ascii").strip()
                for name in ("level", "type", "size")
            )
            sizes += [f"L{level} {size}"] if kind != "Instruction" else []
    except OSError:
        return ""
    return ", ".join(sizes)
