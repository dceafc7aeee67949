"""Holds zeros in the weights of a torch model while it trains, in patterns, at an exact share.

A mask is a parametrization of the weight: what the model computes with is always the product, so
that no step of an optimizer can fill a zero.

Patterns are as in `bertile.numerics.zeros`, inputs × outputs of a block. A torch weight is
(outputs, inputs), and so is what is said here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bertile.base.errors import UsageError
from bertile.compress import schedules
from bertile.compress.recipe import Prune
from bertile.numerics.zeros import BLOCKS

PAIRS, GROUP = 2, 4  # of 2:4
SOFT_THRESHOLD = 0.1  # of a score's sigmoid (Sanh et al. 2020), which begins at 0.5


def block(pattern: str) -> tuple[int, int]:
    """The inputs and the outputs that go together."""
    return (GROUP, 1) if pattern == "2:4" else BLOCKS.get(pattern, (1, 1))


def check(name: str, weight: Tensor, pattern: str) -> None:
    """UsageError where blocks do not fit a weight."""
    for extent, size, what in zip(reversed(weight.shape), block(pattern), ("inputs", "outputs")):
        if extent % size:
            raise UsageError(
                f"pattern {pattern} needs a multiple of {size} {what}; {name} has {extent}",
                "choose another pattern",
            )


def in_blocks(values: Tensor, pattern: str) -> Tensor:
    """The sums (outputs, inputs) of each block; of 2:4 the values themselves."""
    if pattern == "2:4":
        return values
    inputs, outputs = block(pattern)
    rows, columns = values.shape
    return values.reshape(rows // outputs, outputs, columns // inputs, inputs).sum((1, 3))


def spread(blocks: Tensor, pattern: str) -> Tensor:
    """What stands for each block, for each of its weights."""
    if pattern == "2:4":
        return blocks
    inputs, outputs = block(pattern)
    return blocks.repeat_interleave(inputs, 1).repeat_interleave(outputs, 0)


def kept(scores: Tensor, sparsity: float, pattern: str) -> Tensor:
    """Which blocks stay, a mask like the scores of `in_blocks`: all but the lowest.

    Exactly round(sparsity × blocks) go, at least one stays. Of 2:4 the lowest two of every four
    inputs go, at less than its own share in the groups that lose least by it.
    """
    if pattern == "2:4":
        return _two_of_four(scores, sparsity)
    count = min(round(sparsity * scores.numel()), scores.numel() - 1)
    mask = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    # stable, so that of equal scores the same go on every machine
    mask[scores.reshape(-1).sort(stable=True).indices[:count]] = False
    return mask.reshape(scores.shape)


def _two_of_four(scores: Tensor, sparsity: float) -> Tensor:
    groups = scores.reshape(-1, GROUP)
    order = groups.sort(dim=1, stable=True)
    mask = torch.ones_like(groups, dtype=torch.bool)
    mask.scatter_(1, order.indices[:, :PAIRS], False)
    count = round(min(1.0, sparsity * GROUP / PAIRS) * len(groups))
    loss = order.values[:, :PAIRS].sum(1)
    mask[loss.sort(stable=True).indices[count:]] = True
    return mask.reshape(scores.shape)


class Held(nn.Module):
    """Zeros that stay where they are: a weight, or a bias, times a mask."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask.clone())

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


class _Straight(torch.autograd.Function):
    """A mask whose scores get the gradient of the mask itself (Sanh et al. 2020)."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, mask: Tensor) -> Tensor:
        return mask.to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class Scored(nn.Module):
    """Movement pruning: each block has a score, which falls where training shrinks the block.

    `blocks` says which stay, and changes by the scores until it is `frozen`.
    """

    def __init__(self, weight: Tensor, pattern: str) -> None:
        super().__init__()
        self.pattern = pattern
        self.scores = nn.Parameter(torch.zeros_like(in_blocks(weight.detach(), pattern)))
        self.register_buffer("blocks", torch.ones_like(self.scores, dtype=torch.bool))
        self.register_buffer("frozen", torch.zeros((), dtype=torch.bool))

    def forward(self, weight: Tensor) -> Tensor:
        stays = self.blocks if self.frozen else _Straight.apply(self.scores, self.blocks)
        return weight * spread(stays, self.pattern)


class Pruning:
    """Prunes the linear layers of an encoder, by name, while it trains for `total` steps.

    `at(step)` is called before each step; `after(total)` gives the final zeros.
    """

    def __init__(self, linears: dict[str, nn.Linear], prune: Prune, total: int) -> None:
        self.prune, self.total = prune, total
        self.begin, self.end = (round(share * total) for share in (prune.begin, prune.end))
        self.soft = prune.method == "soft-movement"
        self.by_score = prune.method in ("movement", "soft-movement")
        self.masks: dict[str, Held | Scored] = {}
        self.linears = linears
        for name, linear in linears.items():
            check(name, linear.weight, prune.pattern)
            if self.by_score:
                self.masks[name] = Scored(linear.weight, prune.pattern)
            else:
                self.masks[name] = Held(torch.ones_like(linear.weight, dtype=torch.bool))
            parametrize.register_parametrization(linear, "weight", self.masks[name])

    def at(self, step: int) -> None:
        """Bring the masks to what they are at this step."""
        every = max(1, self.prune.every)
        if step < self.begin or step > self.end or (step % every and step != self.end):
            return
        if self.soft and step < self.end:
            self._by_threshold()
        else:
            share = schedules.cubic(step, self.begin, self.end, self.prune.sparsity)
            self._by_rank(share)
        if step == self.end and self.by_score:
            for mask in self.masks.values():
                mask.frozen.fill_(True)

    def scores(self) -> Iterator[nn.Parameter]:
        """What movement learns, with a learning rate of its own."""
        return (mask.scores for mask in self.masks.values() if isinstance(mask, Scored))

    def penalty(self, step: int) -> Tensor | float:
        """What keeps soft movement's scores low, until its masks are final."""
        if not self.soft or step >= self.end:
            return 0.0
        shares = [torch.sigmoid(scores).mean() for scores in self.scores()]
        growth = schedules.cubic(step, self.begin, self.end, 1.0)
        return self.prune.penalty * growth * torch.stack(shares).mean()

    def _by_rank(self, share: float) -> None:
        for name, mask in self.masks.items():
            if isinstance(mask, Scored):
                values = mask.scores.detach()
            else:  # what is pruned already has the magnitude 0, and goes first
                values = in_blocks(self.linears[name].weight.detach().abs(), self.prune.pattern)
            self._set(mask, kept(values, share, self.prune.pattern))

    def _by_threshold(self) -> None:
        """The same of all layers, so that each keeps what it needs."""
        for mask in self.masks.values():
            scores = mask.scores.detach()
            stays = torch.sigmoid(scores) > SOFT_THRESHOLD
            if self.prune.pattern == "2:4":
                stays = stays | _two_of_four(scores, self.prune.sparsity)
            stays.view(-1)[scores.argmax()] = True
            self._set(mask, stays)

    def _set(self, mask: Held | Scored, blocks: Tensor) -> None:
        if isinstance(mask, Scored):
            mask.blocks.copy_(blocks)
        else:
            mask.mask.copy_(spread(blocks, self.prune.pattern))


def density(linears: dict[str, nn.Linear]) -> dict[str, float]:
    """The share of zeros in each layer's weight, as it is computed with."""
    return {name: float((linear.weight == 0).float().mean()) for name, linear in linears.items()}
