"""Shows a person what Bertile is doing: stages, bars and status lines on stderr.

In a terminal or a notebook they are drawn over each other, see `bertile.base.screen`; in a pipe or
a file they are plain lines, and those that would be written over come seldom. What stays is logged
under "bertile" too. A loop anywhere in the program has a bar by `track`.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any, TextIO, TypeVar

from bertile.base.screen import Screen, can_draw, in_notebook

LOG = logging.getLogger("bertile")
LOG.addHandler(logging.NullHandler())  # a library writes nothing where nobody asked for its log

# On a file or a pipe, where a line cannot be written over, status lines come at most this often.
STATUS_SECONDS = 10.0

T = TypeVar("T")
# The progress of the stage that runs, for `track` in whatever it calls.
_running: ContextVar[Any] = ContextVar("bertile_progress", default=None)


@dataclass
class Stage:
    """One stage of a run; the block that does it sets `cached` where nothing was to do."""

    stage: str
    seconds: float = 0.0
    cached: bool = False
    detail: str = ""


class Bar:
    """How far a loop is: `done` of `total`, from which the time that is left follows."""

    def __init__(self, progress: Progress, what: str, total: int | None) -> None:
        self.what, self.total, self.done, self.note = what, total, 0, ""
        self._progress, self._began = progress, time.monotonic()

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Some steps further; `note` says what the last one was."""
        self.done, self.note = self.done + steps, note
        self._progress.show_bar(self)

    @property
    def count(self) -> str:
        """The numbers, and about how long it still takes."""
        if self.total is None:
            return str(self.done) if self.done else ""
        left = max(0, self.total - self.done)
        if not self.done or not left:
            return f"{self.done} of {self.total}"
        seconds = (time.monotonic() - self._began) / self.done * left
        return f"{self.done} of {self.total}, about {_duration(seconds)} left"


class Progress:
    """Lines for a person: none below verbosity 0, details from 1 on."""

    def __init__(self, verbosity: int = 0, stream: TextIO | None = None) -> None:
        self.verbosity = verbosity
        self.stages: list[Stage] = []
        self._stream = stream or sys.stderr
        self._draws = verbosity >= 0 and can_draw(self._stream)
        self._screen: Screen | None = None
        self._handles: dict[int, Any] = {}  # of the screen, by the bar's id
        self._bars: list[Bar] = []
        self._status: Bar | None = None
        self._status_time = float("-inf")

    def say(self, text: str) -> None:
        """One line that stays."""
        LOG.info(text)
        if self.verbosity >= 0:
            self._line(text)

    def detail(self, text: str) -> None:
        """One line that only -v shows."""
        if self.verbosity >= 1:
            self.say(text)
        else:
            LOG.debug(text)

    def status(self, text: str) -> None:
        """What happens now: written over by the next on a terminal, seldom said elsewhere."""
        if self._draws:
            if self._status is None:
                self._status = self._begin(text, None)
            self._status.note = text
            self.show_bar(self._status)
        else:
            self._seldom(text)

    @contextlib.contextmanager
    def bar(self, what: str, total: int | None = None) -> Iterator[Bar]:
        """A bar for as long as the block runs, which advances it."""
        if self._status_time == float("-inf"):  # outside a stage, too, a short loop says nothing
            self._status_time = time.monotonic()
        bar = self._begin(what, total)
        try:
            yield bar
        finally:
            self._end(bar)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Time a stage, say what came of it, and remember it for the summary."""
        entry, began = Stage(name), time.monotonic()
        self._status_time = began
        bar = self._begin(name, None)
        token = _running.set(self)
        try:
            yield entry
        finally:
            _running.reset(token)
            self._end(bar)
        entry.seconds = time.monotonic() - began
        self.stages.append(entry)
        done = "cached" if entry.cached else f"{entry.seconds:.1f} s"
        text = f"{name:<9} {done}{'  ' + entry.detail if entry.detail else ''}"
        LOG.info(text)
        if self.verbosity >= 0:
            self._line(text, "dim" if entry.cached else "")

    def show_bar(self, bar: Bar) -> None:
        """Draw a bar as it is now."""
        if self._draws:
            with self._quietly():
                if id(bar) in self._handles:
                    handle = self._handles[id(bar)]
                    self._screen_of().update(handle, bar.done, bar.total, bar.count, bar.note)
        elif bar.done:
            self._seldom(f"{bar.what:<9} {bar.count}{'  ' + bar.note if bar.note else ''}")

    @contextlib.contextmanager
    def aside(self) -> Iterator[bool]:
        """Leave the terminal to someone who draws bars of their own; False: there is none."""
        self.close()
        try:
            yield self._draws
        finally:
            for bar in self._bars:
                self._draw(bar)

    def summary(self) -> list[dict[str, Any]]:
        """The finished stages as plain values: stage, seconds, cached, detail."""
        return [asdict(stage) for stage in self.stages]

    def close(self) -> None:
        """Take bars and the status off the terminal, so that what follows begins a clean line."""
        if self._status is not None:
            self._bars.remove(self._status)
            self._status = None
        self._handles.clear()
        if self._screen is not None:
            with self._quietly():
                self._screen.close()

    def _begin(self, what: str, total: int | None) -> Bar:
        bar = Bar(self, what, total)
        self._bars.append(bar)
        self._draw(bar)
        return bar

    def _draw(self, bar: Bar) -> None:
        if self._draws:
            with self._quietly():
                self._handles[id(bar)] = self._screen_of().begin(bar.what, bar.total)

    def _end(self, bar: Bar) -> None:
        self._bars.remove(bar)
        if self._status is not None and not any(b is not self._status for b in self._bars):
            self.close()
        handle = self._handles.pop(id(bar), None)
        if handle is not None:
            with self._quietly():
                self._screen_of().end(handle)

    def _screen_of(self) -> Screen:
        if self._screen is None:
            self._screen = Screen(self._stream)
        return self._screen

    def _line(self, text: str, style: str = "") -> None:
        with self._quietly():
            if self._draws:
                self._screen_of().print(text, style)
            else:
                self._stream.write(text + "\n")
                self._stream.flush()

    def _seldom(self, text: str) -> None:
        if self.verbosity >= 0 and time.monotonic() - self._status_time >= STATUS_SECONDS:
            self._status_time = time.monotonic()
            self._line(text)

    @staticmethod
    def _quietly() -> contextlib.AbstractContextManager[None]:
        # progress is no reason to fail: the reader of stderr may be gone
        return contextlib.suppress(OSError, ValueError)


def default_progress() -> Progress:
    """That of a call from Python: bars in a notebook; elsewhere nothing but the log."""
    return Progress(0 if in_notebook() else -1)


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """The items, with a bar of the stage that runs; `total` where they do not know their number."""
    with open_bar(what, len(items) if total is None else total) as bar:  # type: ignore[arg-type]
        for item in items:
            yield item
            bar.advance()


@contextlib.contextmanager
def open_bar(what: str, total: int | None = None) -> Iterator[Bar]:
    """A bar of the stage that runs; of none where none runs."""
    progress = _running.get() or Progress(verbosity=-1)
    with progress.bar(what, total) as bar:
        yield bar


@contextlib.contextmanager
def aside() -> Iterator[bool]:
    """Leave the terminal of the stage that runs to others' bars; False where there is none."""
    progress = _running.get()
    if progress is None:
        yield False
        return
    with progress.aside() as draws:
        yield draws


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
