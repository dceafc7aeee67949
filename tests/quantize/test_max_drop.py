"""The search for layers to keep, with a score that is arithmetic."""

from __future__ import annotations

import math

import pytest

from bertile.base.errors import BertileError
from bertile.numerics.precision import LayerPlan
from bertile.quantize.max_drop import search

LAYERS = 48
BASELINE = 0.9
DECIBELS = {f"w{index}": 10.0 + index for index in range(LAYERS)}  # w0 is the worst
PLAN = {**dict.fromkeys(DECIBELS, LayerPlan("int8")), "pooler": LayerPlan("fp32", why="one row")}


class Score:
    """Each of the harmful layers costs a tenth in int8, and a share of that in bf16."""

    def __init__(self, harmful, in_bf16: float = 0.0) -> None:
        self.harmful, self.share, self.calls = set(harmful), in_bf16, 0

    def __call__(self, plan) -> float:
        self.calls += 1
        cost = {"int8": 0.1, "bf16": 0.1 * self.share, "fp32": 0.0}
        return BASELINE - sum(cost[plan[name].precision] for name in self.harmful)


def searched(score, max_drop=0.005, higher=("bf16", "fp32")):
    return search(PLAN, DECIBELS, score, BASELINE, max_drop, higher)


def kept(result) -> dict[str, str]:
    return {
        name: plan.precision for name, plan in result.plan.items() if plan.why and name in DECIBELS
    }


def test_plan_that_is_good_enough_stays_as_it_is():
    score = Score([])
    result = searched(score)
    assert result.plan is PLAN and score.calls == 1 and result.tried == ((0, "bf16", BASELINE),)


@pytest.mark.parametrize("worst", [0, 1, 6, 23, 46, 47])
def test_as_few_layers_are_kept_as_it_takes(worst):
    score = Score([f"w{worst}"])
    result = searched(score)
    assert kept(result) == {f"w{index}": "bf16" for index in range(worst + 1)}
    assert score.calls <= 2 + math.ceil(math.log2(LAYERS)) == 8


def test_some_drop_is_allowed():
    assert list(kept(searched(Score(["w0", "w9"]), max_drop=0.1))) == ["w0"]


def test_the_reason_names_the_drop():
    result = searched(Score(["w1"]))
    assert result.plan["w0"].why == (
        "with all layers quantized the metric drops by 0.1000, more than 0.005;"
        " among the 2 noisiest"
    )
    assert result.plan["w2"] is PLAN["w2"] and result.plan["pooler"] is PLAN["pooler"]


def test_layers_that_bf16_does_not_help_are_kept_in_fp32():
    assert kept(searched(Score(["w2"], in_bf16=0.5))) == {f"w{i}": "fp32" for i in range(3)}
    assert kept(searched(Score(["w2"]), higher=("fp32",))) == {f"w{i}": "fp32" for i in range(3)}


def test_metric_that_no_plan_keeps_is_an_error():
    with pytest.raises(BertileError, match=r"within 0.005 of 0.9000: the best reaches 0.8500"):
        searched(Score(["w2"], in_bf16=0.5), higher=("bf16",))


def test_plan_that_is_returned_was_scored():
    result = searched(Score(["w5", "w12"]))
    assert (len(kept(result)), "bf16", pytest.approx(BASELINE)) in result.tried
