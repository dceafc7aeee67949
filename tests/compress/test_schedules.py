"""Schedules: their ends, and that they never go back."""

from __future__ import annotations

import pytest

from bertile.compress.schedules import cubic, warm_linear


def test_cubic_grows_from_nothing_to_all_and_fast_at_first():
    shares = [cubic(step, 10, 50, 0.9) for step in range(60)]
    assert shares[:11] == [0.0] * 11 and shares[50:] == [0.9] * 10
    assert shares == sorted(shares)
    assert shares[30] == pytest.approx(0.9 * (1 - 0.5**3))
    assert cubic(5, 5, 5, 0.5) == 0.5, "all at once"


def test_rate_rises_over_the_warmup_and_falls_to_the_end():
    shares = [warm_linear(step, 4, 20) for step in range(20)]
    assert shares[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert shares[4] == 1.0 and shares[-1] == pytest.approx(1 / 16)
    assert all(share > 0 for share in shares)
    assert warm_linear(0, 0, 1) == 1.0, "one step"
