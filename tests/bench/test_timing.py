"""Timing: warmed up first, and only what follows counts."""

from __future__ import annotations

from bertile.bench import timing


def test_every_turn_is_warmed_up_and_only_what_follows_is_measured() -> None:
    done = []
    times = timing.timed(lambda inputs: done.append(1) or [], {}, 4)
    assert len(times) == 4 and len(done) == timing.WARM_UP_LIMIT + 4
