"""Sends requests to a function as its callers do: some at once, back to back or at a rate.

Imports nothing of Bertile, since an engine that lives in another Python runs this file by its path.
"""

from __future__ import annotations

import random
import threading
import time
from typing import NamedTuple

WARM_UP_CALLS = 3  # of each caller: a thread that calls for the first time may start a pool


class Traffic(NamedTuple):
    """How a function is called.

    `callers` call at once, each in a thread of its own. They end after `count` calls together, or
    begin none after `seconds`. With a `rate` requests fall due at random moments, so many a second
    on average, whether or not a caller is free; without, each caller sends its next request when it
    has its answer. Requests are taken in turn from number `first` on, which seeds the moments too.
    """

    callers: int = 1
    count: int | None = None
    seconds: float | None = None
    rate: float | None = None
    first: int = 0


class Served(NamedTuple):
    """What came of it: milliseconds of each call, from the moment that it was due; the seconds from
    the first to the last; the processor time that the process took meanwhile, in seconds.
    """

    milliseconds: list[float]
    seconds: float
    cpu_seconds: float


def drive(infer, requests, traffic: Traffic) -> Served:
    """Call `infer` with the requests behind a warm-up of every caller; what it raises is raised."""
    queue = _Queue(requests, traffic)
    milliseconds: list[float] = []
    failures: list[BaseException] = []
    together = threading.Barrier(traffic.callers, action=queue.open)

    def call() -> None:
        try:
            for number in range(WARM_UP_CALLS):
                infer(requests[(traffic.first + number) % len(requests)])
            together.wait()
            while (ticket := queue.take()) is not None:
                request, due = ticket
                early = due - time.perf_counter()
                if early > 0:
                    time.sleep(early)
                infer(request)
                milliseconds.append((time.perf_counter() - due) * 1e3)
        except threading.BrokenBarrierError:
            return  # another caller has failed, and tells
        except BaseException as error:
            failures.append(error)
            queue.close()
            together.abort()

    others = [threading.Thread(target=call, daemon=True) for _ in range(traffic.callers - 1)]
    for thread in others:
        thread.start()
    call()
    for thread in others:
        thread.join()
    if failures:
        raise failures[0]
    return Served(milliseconds, *queue.elapsed())


class _Queue:
    """The requests that callers take, one each at a time, until there are no more."""

    def __init__(self, requests, traffic: Traffic) -> None:
        self._requests, self._traffic = requests, traffic
        self._lock = threading.Lock()
        self._random = random.Random(traffic.first)
        self._taken, self._closed = 0, False

    def open(self) -> None:
        self._began = self._due = time.perf_counter()
        self._cpu_began = time.process_time()

    def close(self) -> None:
        self._closed = True

    def take(self):
        """The next request and the moment that it is due; None where there is none."""
        with self._lock:
            traffic = self._traffic
            if self._closed or self._taken == traffic.count:
                return None
            if traffic.rate:
                self._due += self._random.expovariate(traffic.rate)
            else:
                self._due = time.perf_counter()
            if traffic.seconds is not None and self._due - self._began >= traffic.seconds:
                return None
            number = traffic.first + self._taken
            self._taken += 1
            return self._requests[number % len(self._requests)], self._due

    def elapsed(self) -> tuple[float, float]:
        """Seconds since it was opened, and of processor time."""
        return time.perf_counter() - self._began, time.process_time() - self._cpu_began
