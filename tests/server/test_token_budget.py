"""The tokens of a call are the fewest whose rate is near the best."""

from __future__ import annotations

import pytest

from bertile.server import token_budget


class Timed:
    """An engine whose calls take a while, and a while for each text, by a clock of its own."""

    def __init__(self, each_call: float, each_text: float) -> None:
        self.each_call, self.each_text = each_call, each_text
        self.longest, self.now = 0, 0.0

    def run(self, encodings):
        """Nothing, but for its time."""
        self.longest = max(self.longest, *map(len, encodings))
        self.now += self.each_call + self.each_text * len(encodings)

    def perf_counter(self) -> float:
        """The seconds that calls have taken."""
        return self.now


@pytest.fixture
def timed(monkeypatch):
    """An engine by whose clock calls are measured."""

    def engine(each_call: float, each_text: float) -> Timed:
        made_up = Timed(each_call, each_text)
        monkeypatch.setattr(token_budget, "time", made_up)
        return made_up

    return engine


def test_call_is_as_large_as_pays(timed) -> None:
    tokens, rate = token_budget.measured(timed(0.0, 0.0005), None)
    assert tokens == 16 * 16  # the smallest that is tried
    assert rate == pytest.approx(2 / 0.0005)
    tokens, rate = token_budget.measured(timed(0.02, 0.0), None)
    assert (tokens, rate) == (64 * 16, pytest.approx(64 / 0.02))


def test_texts_are_no_longer_than_the_model_takes(timed) -> None:
    engine = timed(0.001, 0.0)
    token_budget.measured(engine, 5)
    assert engine.longest == 5


def test_slow_model_is_measured_by_its_first_calls(timed) -> None:
    engine = timed(0.5, 0.0)
    token_budget.measured(engine, None)
    assert engine.now < 3
