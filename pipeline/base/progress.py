"""Shows a person what Bertile is doing: stages and status lines on stderr."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, TextIO

# On a file or a pipe, where a line cannot be written over, status lines come at most this often.
STATUS_SECONDS = 10.0


@dataclass
class Stage:
    """One stage of a run; the block that does it sets `cached` where nothing was to do."""

    stage: str
    seconds: float = 0.0
    cached: bool = False
    detail: str = ""


class Progress:
    """Lines for a person: none below verbosity 0, details from 1 on."""

    def __init__(self, verbosity: int = 0, stream: TextIO | None = None):
        self.verbosity = verbosity
        self.stages: list[Stage] = []
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._status_shown = False
        self._status_time = float("-inf")

    def say(self, text: str) -> None:
        """One line that stays."""
        if self.verbosity >= 0:
            self.close()
            self._write(text + "\n")

    def detail(self, text: str) -> None:
        """One line that only -v shows."""
        if self.verbosity >= 1:
            self.say(text)

    def status(self, text: str) -> None:
        """What happens now: written over by the next line on a terminal, seldom elsewhere."""
        if self.verbosity < 0:
            return
        if self._terminal:
            self.close()
            self._write(text[: shutil.get_terminal_size().columns - 1])
            self._status_shown = True
        elif time.monotonic() - self._status_time >= STATUS_SECONDS:
            self._status_time = time.monotonic()
            self._write(text + "\n")

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Time a stage, say what came of it, and remember it for the summary."""
        entry, began = Stage(name), time.monotonic()
        if self._terminal:
            self.status(f"{name:<9} ...")
        self._status_time = began
        try:
            yield entry
        finally:
            self.close()
        entry.seconds = time.monotonic() - began
        self.stages.append(entry)
        done = "cached" if entry.cached else f"{entry.seconds:.1f} s"
        self.say(f"{name:<9} {done}{'  ' + entry.detail if entry.detail else ''}")

    def summary(self) -> list[dict[str, Any]]:
        """The finished stages as plain values: stage, seconds, cached, detail."""
        return [asdict(stage) for stage in self.stages]

    def close(self) -> None:
        """Take a status line off the terminal, so that what follows starts on a clean line."""
        if self._status_shown:
            self._write("\r\x1b[K")
            self._status_shown = False

    def _write(self, text: str) -> None:
        # progress is no reason to fail: the reader of stderr may be gone
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
            self._stream.flush()
