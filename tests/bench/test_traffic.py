"""Callers: how many at once, when they call, and what a latency counts."""

from __future__ import annotations

import threading
import time

import pytest

from bertile.bench.traffic import WARM_UP_CALLS, Traffic, drive

REQUESTS = [{"number": number} for number in range(3)]


class Model:
    """Takes `seconds` for a call; remembers requests, and how many it answered at once."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.lock = seconds, threading.Lock()
        self.numbers: list[int] = []
        self.within = self.most = 0

    def __call__(self, inputs: dict) -> list:
        with self.lock:
            self.numbers.append(inputs["number"])
            self.within += 1
            self.most = max(self.most, self.within)
        time.sleep(self.seconds)
        with self.lock:
            self.within -= 1
        return []


def test_callers_share_a_number_of_calls() -> None:
    model = Model(0.01)
    served = drive(model, REQUESTS, Traffic(callers=2, count=6))
    assert len(served.milliseconds) == 6 and len(model.numbers) == 6 + 2 * WARM_UP_CALLS
    assert model.most == 2 and 0.03 <= served.seconds < 0.06 + 0.5
    assert min(served.milliseconds) >= 10


def test_requests_are_taken_in_turn_from_the_first() -> None:
    model = Model()
    drive(model, REQUESTS, Traffic(count=4, first=2))
    assert model.numbers[WARM_UP_CALLS:] == [2, 0, 1, 2]


def test_no_call_begins_behind_the_time() -> None:
    model = Model(0.02)
    served = drive(model, REQUESTS, Traffic(seconds=0.05))
    assert 1 <= len(served.milliseconds) <= 3


def test_latency_counts_from_the_moment_that_a_request_was_due() -> None:
    # 200 a second are due and 50 can be answered: each waits longer than the one before
    late = drive(Model(0.02), REQUESTS, Traffic(count=10, rate=200)).milliseconds
    assert late[-1] > 80 and late[-1] > late[1]
    model = Model(0.02)
    served = drive(model, REQUESTS, Traffic(count=5, rate=20))
    assert served.seconds > 5 * 0.02  # with pauses between requests
    again = drive(model, REQUESTS, Traffic(count=5, rate=20))
    assert again.seconds == pytest.approx(served.seconds, abs=0.15)  # the same moments


def test_processor_time_is_that_of_the_process() -> None:
    def work(inputs: dict) -> None:
        until = time.process_time() + 0.01
        while time.process_time() < until:
            pass

    assert drive(work, REQUESTS, Traffic(count=5)).cpu_seconds >= 0.05
    assert drive(Model(0.02), REQUESTS, Traffic(count=5)).cpu_seconds < 0.05


@pytest.mark.parametrize("callers", [1, 3])
@pytest.mark.parametrize("bad", [1, WARM_UP_CALLS * 3 + 2])
def test_what_a_call_raises_is_raised_and_all_callers_end(callers: int, bad: int) -> None:
    calls: list[int] = []

    def fail(inputs: dict) -> None:
        calls.append(1)
        if len(calls) >= bad:
            raise ValueError("no memory")

    with pytest.raises(ValueError, match="no memory"):
        drive(fail, REQUESTS, Traffic(callers=callers, seconds=60))
    assert threading.active_count() < 20 and len(calls) < bad + 2 * callers
