"""What tests of tuning share."""

from __future__ import annotations

import pytest

from bertile.tune.search import tuner


@pytest.fixture(scope="module")
def no_slow_spells():
    """Other tests run meanwhile, and what they take is no reason to measure again: as many trials
    as are asked for.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuner, "SLOW", float("inf"))
        patch.setattr(tuner, "TURNS", 2)
        yield
