"""Says how a share grows over the steps of a training: sparsity, or the learning rate."""

from __future__ import annotations


def cubic(step: int, begin: int, end: int, final: float) -> float:
    """0 up to `begin`, `final` from `end` on, and between them fast at first, then slower.

    Zhu & Gupta 2017, equation 1.
    """
    if step >= end:
        return final
    if step < begin:
        return 0.0
    return final * (1 - (1 - (step - begin) / (end - begin)) ** 3)


def warm_linear(step: int, warmup: int, total: int) -> float:
    """The share of the full learning rate: it rises over `warmup` steps and falls to 0 at the end.

    `step` counts from 0, and none of the steps has the rate 0.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (total - step) / max(1, total - warmup)
