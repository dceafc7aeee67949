"""Draws bars and colours in a terminal or a notebook, with rich where that is installed."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

REFRESHES = 8  # a second
NOTE = 60  # characters of what stands behind a bar


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook that can show widgets."""
    import sys

    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    kernel = getattr(shell, "kernel", None) is not None
    return kernel and find_spec("ipywidgets") is not None


def can_draw(stream: TextIO) -> bool:
    """Whether lines of a stream can be written over: a terminal or a notebook, and rich is there.

    rich itself is not imported: a command that only prints a line does not wait for it.
    """
    terminal = stream.isatty() and os.environ.get("TERM") != "dumb"
    return (terminal or in_notebook()) and find_spec("rich") is not None


def show(text: str, stream: TextIO) -> None:
    """Write a result as a line of its own, its numbers and names coloured where a person reads it.

    What is written is the text itself, whatever its width; NO_COLOR is followed.
    """
    if stream.isatty() and can_draw(stream):
        console(stream).print(text, markup=False, emoji=False, soft_wrap=True)
    else:
        stream.write(text + "\n")
    stream.flush()


def console(stream: TextIO) -> Any:
    """rich's console on a stream."""
    from rich.console import Console

    return Console(file=stream)


class Screen:
    """The lines at the bottom of a terminal that say what is going on, one for each open bar."""

    def __init__(self, stream: TextIO) -> None:
        self.console = console(stream)
        self._bars: Bars | None = None

    def print(self, text: str, style: str = "") -> None:
        """One line that stays, above the bars."""
        self.console.print(text, style=style, markup=False, emoji=False, soft_wrap=True)

    def begin(self, what: str, total: int | None) -> Any:
        """Open a bar and return its handle; without a total, it only shows that something runs."""
        if self._bars is None:
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            self._bars = Progress(
                TextColumn("{task.description:<9}", style="bold"),
                BarColumn(24),
                TextColumn("{task.fields[count]}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[note]}", style="dim"),
                console=self.console,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
                refresh_per_second=REFRESHES,
            )
            self._bars.start()
        return self._bars.add_task(what, total=total, count="", note="")

    def update(self, bar: Any, done: int, total: int | None, count: str, note: str) -> None:
        """Say how far a bar is."""
        if self._bars is not None:
            fields = {"count": count, "note": note[:NOTE]}
            full = total is not None and done >= total  # which is shown, however soon it goes
            self._bars.update(bar, completed=done, total=total, refresh=full, **fields)

    def end(self, bar: Any) -> None:
        """Take a bar away; with the last one the screen is as it was."""
        if self._bars is not None:
            self._bars.remove_task(bar)
            if not self._bars.task_ids:
                self.close()

    def close(self) -> None:
        """Take all bars away."""
        bars, self._bars = self._bars, None
        if bars is not None:
            bars.stop()
