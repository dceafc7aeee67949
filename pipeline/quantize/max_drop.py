"""Chooses the layers that stay in higher precision, so that a plan in 8 bits keeps its score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bertile.base.errors import BertileError
from bertile.numerics.precision import LayerPlan, Plan

Score = Callable[[Plan], float]


@dataclass(frozen=True)
class Search:
    """The plan that was found, and every plan that was scored: (layers kept, precision, score)."""

    plan: Plan
    tried: tuple[tuple[int, str, float], ...]


def search(
    plan: Plan,
    decibels: Mapping[str, float],
    score: Score,
    baseline: float,
    max_drop: float,
    higher: Sequence[str],
) -> Search:
    """Keep as few layers of `plan` as it takes for the score to stay within `max_drop`.

    `decibels` is the output's signal-to-noise of each layer that is in question: the lowest are
    kept first. How many is found by bisection, which takes 1 + log2(layers) scores, since each is
    a compile. They are kept in the first precision of `higher` that is good enough with all of
    them. Raises BertileError where none is.
    """
    order = sorted(decibels, key=lambda name: decibels[name])
    tried: list[tuple[int, str, float]] = []

    def good(kept: int, precision: str) -> bool:
        value = score(_keeping(plan, order[:kept], precision, ""))
        tried.append((kept, precision, value))
        return baseline - value <= max_drop

    if good(0, higher[0]):
        return Search(plan, tuple(tried))
    cost = f"with all layers quantized the metric drops by {baseline - tried[0][2]:.4f}"
    for precision in higher:
        kept = _fewest(len(order), lambda count, p=precision: good(count, p))
        if kept is not None:
            why = f"{cost}, more than {max_drop:g}; among the {kept} noisiest"
            return Search(_keeping(plan, order[:kept], precision, why), tuple(tried))
    best = max(value for _, _, value in tried)
    raise BertileError(
        f"no choice of layers keeps the metric within {max_drop:g} of {baseline:.4f}: the best"
        f" reaches {best:.4f}",
        "allow a larger --max-drop, or compile with --precision fp32",
    )


def _fewest(count: int, good: Callable[[int], bool]) -> int | None:
    """The smallest number up to `count` that is good, if a larger one always is; else None.

    What is returned was found good; `count` itself is tried only where nothing below it is.
    """
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        if good(middle):
            high = middle
        else:
            low = middle
    return high if high < count or good(count) else None


def _keeping(plan: Plan, names: Sequence[str], precision: str, why: str) -> Plan:
    return {**plan, **{name: LayerPlan(precision, why=why) for name in names}}
