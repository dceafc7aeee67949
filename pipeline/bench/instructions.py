"""Counts the instructions that a text takes: by the processor's own counter, else under valgrind.

A bundle's own command runs a text a few times, and a few times more: the difference is the texts',
without what loading takes. By hand it is the same:

    perf stat -e instructions:u BUNDLE/bertile-run --ids "101 7592 102" --threads 1 --repeat 5
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bertile.bundle.native_build import COMMAND

FEW, MORE = 1, 2  # calls
SECONDS = 600  # of a run under valgrind, which may take a thousand times as long as the processor
# Why a counter that works gives nothing for a bundle.
WHY_NOT_THESE = (
    "texts that leave early are not counted, nor, under valgrind, AVX-512"
    " (--target x86-avx2 compiles without it)"
)


@dataclass(frozen=True)
class Counter:
    """A program that runs another and says how many instructions that took; `said` finds it."""

    name: str
    words: tuple[str, ...]
    said: str

    def count(self, command: Sequence[str]) -> int | None:
        """How many instructions a command takes; None where it cannot be run or counted."""
        try:
            run = subprocess.run(
                [*self.words, *command],
                capture_output=True,
                text=True,
                timeout=SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        match = re.search(self.said, run.stderr, flags=re.MULTILINE)
        return int(match[1].replace(",", "")) if match and run.returncode == 0 else None


COUNTERS = (
    Counter("perf", ("perf", "stat", "-x", ";", "-e", "instructions:u"), r"^(\d+);;instructions:u"),
    Counter(
        "valgrind",
        ("valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"),
        r"I +refs: +([\d,]+)",
    ),
)


def counter(counters: Sequence[Counter] = COUNTERS) -> Counter | None:
    """The first that counts anything here, None where none does."""
    true = shutil.which("true") or "true"
    return next((each for each in counters if each.count([true])), None)


def why_not() -> str:
    """What to say where nothing counts."""
    names = " and ".join(each.name for each in COUNTERS)
    return f"instructions are not counted: {names} are missing, or may count nothing here"


def of_text(bundle: Path, length: int, by: Counter) -> float | None:
    """The instructions of a text of so many tokens on one thread; None where the bundle has no
    command of its own, or the counter cannot run it.
    """
    command = [str(bundle / COMMAND), "--ids", " ".join(["7"] * length), "--threads", "1"]
    command += ["--skip-hashes", "--repeat"]
    few, more = (by.count([*command, str(times)]) for times in (FEW, MORE))
    return (more - few) / (MORE - FEW) if few and more else None
