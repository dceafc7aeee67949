"""The tokens of a call are the fewest whose rate is near the best."""

from __future__ import annotations

import time

import pytest

from bertile.server import token_budget


class Timed:
    """An engine whose calls take a while, and a while for each text."""

    def __init__(self, each_call: float, each_text: float) -> None:
        self.each_call, self.each_text = each_call, each_text
        self.longest = 0

    def run(self, encodings):
        """Nothing, after its time."""
        self.longest = max(self.longest, *map(len, encodings))
        time.sleep(self.each_call + self.each_text * len(encodings))


def test_call_is_as_large_as_pays() -> None:
    tokens, rate = token_budget.measured(Timed(0.0, 0.0005), None)
    assert tokens == 16 * 16  # the smallest that is tried
    assert rate == pytest.approx(2 / 0.0005, rel=0.5)
    tokens, _ = token_budget.measured(Timed(0.02, 0.0), None)
    assert tokens == 64 * 16


def test_texts_are_no_longer_than_the_model_takes() -> None:
    engine = Timed(0.0, 0.0)
    token_budget.measured(engine, 5)
    assert engine.longest == 5


def test_slow_model_is_measured_by_its_first_calls() -> None:
    engine = Timed(0.5, 0.0)
    began = time.monotonic()
    token_budget.measured(engine, None)
    assert time.monotonic() - began < 3
