"""Masks: exact shares, whole blocks, and zeros that no step fills."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from bertile.compress import masks
from bertile.compress.recipe import PATTERNS, Prune
from bertile.errors import UsageError
from bertile.export import pruning
from bertile.numerics.zeros import analyse

METHODS = ("magnitude", "movement", "soft-movement")


def shares(pattern: str) -> tuple[float, ...]:
    return (0.5,) if pattern == "2:4" else (0.3, 0.8, 0.9)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_magnitudes_give_the_mask_of_one_shot_pruning(pattern):
    w = torch.randn(48, 64, generator=torch.Generator().manual_seed(1))
    for share in shares(pattern):
        blocks = masks.kept(masks.in_blocks(w.abs(), pattern), share, pattern)
        mask = masks.spread(blocks, pattern)
        assert (mask.numpy().T == pruning.kept(w.numpy().T, share, pattern)).all()
        seen = analyse((w * mask).numpy().T)
        assert seen.pattern == pattern or share < 0.5
        assert seen.zeros == pytest.approx(share, abs=1 / blocks.numel())


def test_two_of_four_comes_group_by_group():
    w = torch.randn(8, 16, generator=torch.Generator().manual_seed(2)).abs()
    for share, groups in ((0.0, 0), (0.25, 16), (0.5, 32)):
        mask = masks.kept(w, share, "2:4").reshape(-1, 4)
        assert int((mask.sum(1) == 2).sum()) == groups
        assert int((mask.sum(1) == 4).sum()) == 32 - groups


def test_equal_scores_still_give_the_exact_count():
    mask = masks.kept(torch.zeros(10, 10), 0.37, "unstructured")
    assert int((~mask).sum()) == 37
    assert int(masks.kept(torch.zeros(2, 2), 0.999, "unstructured").sum()) == 1


def test_blocks_that_do_not_fit_are_named():
    linears = {"some.layer": nn.Linear(30, 8)}
    with pytest.raises(UsageError, match=r"needs a multiple of 16 inputs; some\.layer has 30"):
        masks.Pruning(linears, Prune(pattern="16x1"), 10)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", METHODS)
def test_zeros_are_respected_after_every_step(method, pattern):
    """Also with momentum and decay, by what the layer computes."""
    torch.manual_seed(3)
    linear, sparsity, total = nn.Linear(32, 16), shares(pattern)[-1], 40
    prune = Prune(method, pattern, sparsity, begin=0.1, end=0.75, every=1, score_rate=0.5)
    pruning_of = masks.Pruning({"layer": linear}, prune, total)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=0.05)
    x, wanted = torch.randn(64, 32), torch.randn(64, 16)
    before = linear.weight.detach().clone()
    zeros = []
    for step in range(total):
        pruning_of.at(step)
        (nn.functional.mse_loss(linear(x), wanted) + pruning_of.penalty(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        effective = linear.weight.detach()
        zeros.append(float((effective == 0).float().mean()))
        probed = torch.autograd.functional.jacobian(lambda v: linear(v), torch.zeros(32))
        assert torch.equal(probed == 0, effective == 0)
    pruning_of.at(total)
    assert zeros[0] == 0.0
    exact = 1 - float(
        masks.kept(masks.in_blocks(before, pattern), sparsity, pattern).float().mean()
    )
    assert zeros[-1] == pytest.approx(exact, abs=1e-6), "the exact share from the end on"
    assert len(set(zeros[30:])) == 1, "final behind the schedule's end"
    if method != "soft-movement":
        assert zeros == sorted(zeros), "it grows"
    assert not torch.equal(linear.weight.detach() * (effective != 0), before * (effective != 0))


def test_movement_keeps_what_grows_though_it_is_small():
    """The weights that training enlarges stay, the large ones that it shrinks go."""
    linear = nn.Linear(8, 1, bias=False)
    linear.weight.data = torch.tensor([[0.1] * 4 + [1.0] * 4])
    goal = torch.tensor([[1.0] * 4 + [0.0] * 4])
    prune = Prune("movement", "unstructured", 0.5, begin=0.4, end=0.5, every=1)
    pruning_of = masks.Pruning({"layer": linear}, prune, 20)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    for step in range(20):
        pruning_of.at(step)
        (linear.weight - goal).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (linear.weight != 0).tolist() == [[True] * 4 + [False] * 4]
    magnitude = masks.kept(torch.tensor([[0.1] * 4 + [1.0] * 4]), 0.5, "unstructured")
    assert magnitude.tolist() == [[False] * 4 + [True] * 4], "which magnitudes would not"


def test_folding_leaves_plain_weights_with_the_zeros():
    from bertile.compress.learner import fold

    model = nn.Sequential(nn.Linear(8, 4))
    pruning_of = masks.Pruning({"0": model[0]}, Prune(pattern="4x1", sparsity=0.5), 1)
    pruning_of.at(1)
    seen = model[0].weight.detach().clone()
    fold(model)
    assert set(model.state_dict()) == {"0.bias", "0.weight"}
    assert torch.equal(model[0].weight, seen)
    assert np.isclose(float((seen == 0).float().mean()), 0.5)
