"""What the ranking by estimate is worth: correlation and regret of a known list, and a real run."""

from __future__ import annotations

import pytest

from bertile.studies import mca_rank
from bertile.studies.mca_rank import Point, rank
from bertile.tune.log.tuning_log import SURE


def points(*pairs: tuple[float, float]) -> list[Point]:
    return [Point({}, {128: guess, 16: guess}, {128: real, 16: real}) for guess, real in pairs]


def test_equal_order_correlates_fully_whatever_the_values():
    ranked = rank(points((3, 30), (1, 11), (2, 12), (9, 99)), 128)
    assert ranked.correlation == pytest.approx(1) and ranked.regret == 0 == ranked.of_five
    assert ranked.default == pytest.approx(30 / 11 - 1)


def test_regret_is_of_the_candidate_that_looked_best():
    ranked = rank(points((2, 10), (1, 15), (3, 20)), None)
    assert ranked.regret == pytest.approx(0.5) and ranked.of_five == pytest.approx(0)
    assert ranked.correlation == pytest.approx(0.5)
    assert ranked.error == pytest.approx(1 - 3 / 20)


def test_small_promise_is_not_taken_and_a_large_one_is():
    """The default is estimated at 100 and takes 10; the other takes 20 whatever is promised."""
    for guess, taken in ((100 / SURE + 1, 0.0), (100 / SURE - 1, 1.0)):
        ranked = rank(points((100, 10), (guess, 20)), 128)
        assert ranked.taken == pytest.approx(taken) and ranked.regret == pytest.approx(1.0)
        assert ranked.promised == pytest.approx(1 + 0.9 * (100 / guess * 2 - 1) - 1)


@pytest.mark.usefixtures("llvm_mca")
def test_command_prints_a_row_per_number_of_tokens(capsys, monkeypatch):
    monkeypatch.setattr(mca_rank, "LAYERS", ((64, 48, "none", False),))
    mca_rank.main(["--precision", "fp32", "--settings", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert "rank correlation" in lines[0]
    assert [line.split()[1] for line in lines[1:] if line.startswith("dense")] == [
        "16",
        "128",
        "384",
        "all",
    ]
