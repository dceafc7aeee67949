"""Stands in for a model's engine behind a scheduler: it notes its calls, and waits when it is told.

A text is its number of tokens; its answer is that number.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any

from bertile.server.scheduler import Scheduler, Work
from bertile.text.engine import Answer
from bertile.text.text_model import Steps

LONG_WAIT = 20.0  # seconds, for what is sure to come


class Noting:
    """An engine whose calls are noted in `calls`, as the lengths of their texts.

    While it is `held`, calls wait. `failing` says of the lengths of a call what it raises.
    """

    def __init__(self, places: int = 1) -> None:
        self.places = places
        self.calls: list[list[int]] = []
        self.alone: list[int] = []  # texts that had all threads
        self.failing: Callable[[list[int]], Exception | None] = lambda lengths: None
        self.running = 0
        self._free, self._changed = threading.Event(), threading.Condition()
        self._free.set()

    def hold(self) -> None:
        """Let calls wait from now on."""
        self._free.clear()

    def release(self) -> None:
        """Let all calls go on."""
        self._free.set()

    async def begun(self, calls: int) -> None:
        """Wait until so many calls have begun."""

        def wait() -> bool:
            with self._changed:
                return self._changed.wait_for(lambda: len(self.calls) >= calls, LONG_WAIT)

        assert await asyncio.to_thread(wait), self.calls

    def run(self, encodings: Sequence[Any]) -> list[Answer]:
        """The lengths of the texts."""
        lengths = [len(encoding) for encoding in encodings]
        with self._changed:
            self.calls.append(lengths)
            self.running += 1
            self._changed.notify_all()
        assert self._free.wait(LONG_WAIT)
        with self._changed:
            self.running -= 1
        if (error := self.failing(lengths)) is not None:
            raise error
        return [Answer(encoding, {"length": len(encoding)}) for encoding in encodings]

    def single(self, encoding: Any) -> Answer:
        """The length of a text that runs alone."""
        self.alone.append(len(encoding))
        return self.run([encoding])[0]


def prepare(texts: Sequence[str], first: int = 1) -> list[list[int]]:
    """A text of as many tokens as it says."""
    return [[0] * int(text) for text in texts]


STEPS = Steps(prepare, lambda answer: answer.outputs["length"])


def submit(
    scheduler: Scheduler, *lengths: int, deadline: float | None = None, steps: Steps = STEPS
) -> Work:
    """A work with texts of these lengths, which is in the scheduler's hands."""
    done = asyncio.get_running_loop().create_future()
    work = Work([str(length) for length in lengths], steps, done, deadline)
    scheduler.submit(work)
    return work


async def settled(*works: Work) -> None:
    """Wait until all works are done."""
    await asyncio.wait_for(asyncio.gather(*(work.done for work in works)), LONG_WAIT)
