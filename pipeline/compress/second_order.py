"""Prunes without training, by second order: what goes is made up for by what stays.

Optimal brain surgeon, a layer at a time, on the inputs that a few texts give it: the error of its
outputs is w H w, H the sum of x xᵀ. Blocks go that cost least by that measure, and the inputs that
are still to come make up for the error (Frantar & Alistarh 2023, SparseGPT; Kurtić et al. 2022,
oBERT, for blocks). An encoder layer sees what the pruned layers before it give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from bertile.base.progress import track
from bertile.compress import masks
from bertile.compress.recipe import Prune
from bertile.compress.watching import watch_inputs
from bertile.families.family import Family
from bertile.quantize import gptq

BLOCK = 128  # inputs whose errors are handed to all others at once


def prune(
    model: nn.Module, family: Family, prune: Prune, batches: Sequence[Mapping[str, Tensor]]
) -> None:
    """Prune the linear layers of an encoder in place; each has exactly the share of zeros."""
    for layer in track(family.encoder_layers(model), "second order"):
        moments = _moments(model, layer, batches)
        for name, linear in layer.items():
            masks.check(name, linear.weight, prune.pattern)
            pruned = pruned_weight(
                linear.weight.detach(), moments[name], prune.sparsity, prune.pattern
            )
            linear.weight.data.copy_(pruned)


def pruned_weight(w: Tensor, moments: Tensor, sparsity: float, pattern: str) -> Tensor:
    """w (outputs, inputs) with zeros, given the sum (inputs, inputs) of x xᵀ over tokens.

    In each BLOCK of inputs the same share of blocks goes.
    """
    rest = w.double().clone()
    result = torch.zeros_like(rest)
    upper = torch.from_numpy(gptq.factor(moments.numpy())).double()
    size, outputs = masks.block(pattern)
    count, inputs = 0, w.shape[1]
    step = max(size, BLOCK - BLOCK % size)
    for start in range(0, inputs, step):
        stop = min(start + step, inputs)
        diagonal = upper.diagonal()[start:stop]
        cost = masks.in_blocks((rest[:, start:stop] / diagonal) ** 2, pattern)
        if pattern == "2:4":
            stays = masks.kept(cost, sparsity, pattern)
        else:  # rounded over all, so that the whole has the exact share
            wanted = round(sparsity * (w.shape[0] // outputs) * (stop // size)) - count
            stays = torch.ones(cost.numel(), dtype=torch.bool)
            stays[cost.reshape(-1).sort(stable=True).indices[:wanted]] = False
            stays, count = stays.reshape(cost.shape), count + wanted
        mask = masks.spread(stays, pattern)
        errors = torch.zeros_like(rest[:, start:stop])
        for place in range(stop - start):
            k = start + place
            kept = rest[:, k] * mask[:, place]
            result[:, k] = kept
            error = (rest[:, k] - kept) / upper[k, k]
            errors[:, place] = error
            rest[:, k + 1 : stop] -= error[:, None] * upper[k, k + 1 : stop]
        rest[:, stop:] -= errors @ upper[start:stop, stop:]
    return result.to(w.dtype)


def _moments(
    model: nn.Module, layer: Mapping[str, nn.Linear], batches: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The sum of x xᵀ over the real tokens that come into each linear layer."""
    totals = {name: torch.zeros(m.in_features, m.in_features) for name, m in layer.items()}

    def see(name: str, x: Tensor) -> None:
        totals[name] += x.T @ x

    training = model.training
    model.eval()
    watch_inputs(model, layer, batches, see)
    model.train(training)
    return totals
