"""Gives weights few values: the centres of k-means, or one magnitude with a sign.

This is a form to store and to send a model in. A bundle holds int8 or floats: it gets no smaller
and no faster by k-means; a binary weight is exact in int8.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bertile.compress.fake_quant import straight
from bertile.compress.recipe import Storage

ROUNDS = 25  # of k-means, which hardly moves after ten


class Binary(nn.Module):
    """The sign of each weight, times the mean magnitude of its output (Rastegari et al. 2016).

    Zeros, as pruning makes them, stay.
    """

    def forward(self, w: Tensor) -> Tensor:
        held = w.detach()
        used = (held != 0).sum(1, keepdim=True).clamp(min=1)
        scale = held.abs().sum(1, keepdim=True) / used
        return straight(w, torch.sign(held) * scale)


class Clusters(nn.Module):
    """The nearest of a layer's centres, which are set once; zero is always one of them."""

    def __init__(self, w: Tensor, count: int) -> None:
        super().__init__()
        self.register_buffer("centres", centres(w.detach(), count))

    def forward(self, w: Tensor) -> Tensor:
        held = w.detach()
        middles = (self.centres[1:] + self.centres[:-1]) / 2
        return straight(w, self.centres[torch.bucketize(held, middles)])


def centres(w: Tensor, count: int) -> Tensor:
    """The centres of k-means over all weights, in order, begun at even quantiles (Lloyd 1982)."""
    values = w.reshape(-1).double()
    values = values[values != 0].sort().values
    if not len(values):
        return torch.zeros(1, dtype=w.dtype)
    places = torch.linspace(0, len(values) - 1, max(1, count - 1)).round().long()
    middle = values[places].unique()
    sums = torch.cat([values.new_zeros(1), values.cumsum(0)])
    for _ in range(ROUNDS):
        edges = torch.searchsorted(values, (middle[1:] + middle[:-1]) / 2)
        edges = torch.cat([edges.new_zeros(1), edges, edges.new_full((1,), len(values))])
        counts = edges[1:] - edges[:-1]
        mean = (sums[edges[1:]] - sums[edges[:-1]]) / counts.clamp(min=1)
        middle = torch.where(counts > 0, mean, middle)
    return torch.cat([middle, middle.new_zeros(1)]).unique().to(w.dtype)


def install(linears: dict[str, nn.Linear], storage: Storage) -> None:
    """Let the layers compute with such weights."""
    for linear in linears.values():
        kind: nn.Module = Binary()
        if storage.form == "k-means":
            kind = Clusters(linear.weight, storage.clusters)
        parametrize.register_parametrization(linear, "weight", kind)


def report(linears: dict[str, nn.Linear], storage: Storage) -> dict[str, Any]:
    """How many bytes the layers' weights take in this form, in fp32 and in int8."""
    weights = sum(linear.weight.numel() for linear in linears.values())
    outputs = sum(linear.out_features for linear in linears.values())
    if storage.form == "binary":
        stored = weights // 8 + 4 * outputs
        note = "exact in an int8 bundle, which stores a byte a weight: no smaller, and as fast"
    else:
        bits = math.ceil(math.log2(storage.clusters))
        stored = weights * bits // 8 + 4 * storage.clusters * len(linears)
        note = "a bundle stores fp32, fp16 or int8: it gets neither smaller nor faster by clusters"
    return {
        "form": storage.form,
        "bytes": stored,
        "fp32_bytes": 4 * weights,
        "int8_bytes": weights + 4 * outputs,
        "note": note,
    }
