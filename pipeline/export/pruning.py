"""Sets the smallest weights of a torch encoder's linear layers to zero, in a pattern, all at once.

One-shot magnitude pruning: blocks of each layer are ranked by the sum of their magnitudes (L1), and
the smallest are set to zero. Nothing is trained, so accuracy suffers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bertile.base.errors import ModelError, UsageError, nearest
from bertile.families import table
from bertile.numerics.zeros import BLOCKS, analyse

PATTERNS = ("4x1", "16x1", "32x1", "1x16", "2:4", "unstructured", "heads", "neurons")
DEFAULT = 0.9
TWO_OF_FOUR = 0.5


@dataclass(frozen=True)
class Pruned:
    """A layer with the sizes of its weight, and what zeros it has now (see ``sparsity``)."""

    layer: str
    inputs: int
    outputs: int
    zeros: float
    pattern: str


def check(sparsity: float | None, pattern: str) -> float:
    """The sparsity, or the pattern's own where it is None; UsageError for what there is not."""
    if pattern not in PATTERNS:
        raise UsageError(f"pattern '{pattern}' is unknown{nearest(pattern, PATTERNS)}")
    wanted = TWO_OF_FOUR if pattern == "2:4" else DEFAULT
    share = wanted if sparsity is None else sparsity
    if not 0 < share < 1:
        raise UsageError(
            f"sparsity {share:g} is not between 0 and 1", "give the share of zeros, such as 0.9"
        )
    if pattern == "2:4" and share != TWO_OF_FOUR:
        raise UsageError(
            f"sparsity {share:g} is not that of pattern 2:4, which is {TWO_OF_FOUR:g}",
            "leave --sparsity out, or choose another pattern",
        )
    return share


def prune(model: Any, family: str, sparsity: float, pattern: str) -> list[Pruned]:
    """Prune a transformers model of a family of ``families.table`` in place.

    `sparsity` is the share of zeros in every linear layer of every encoder layer; of heads, or of
    neurons, where the pattern is that. Embeddings, pooler and head of the model stay as they are.
    """
    row = table.named(family)
    if not row.own:
        raise ModelError(
            f"a model of type '{family}' cannot be pruned: it has no row that names its layers",
            "prune it by another program: zeros in any model's weights are skipped",
        )
    if pattern == "heads" and row.by_head:
        raise UsageError(
            f"{row.title} has no pattern heads: Q, K and V of each lie together in one layer",
            "choose another pattern",
        )
    layers = row.encoder_layers(model)
    for layer in layers:
        into, (out,), first, (second,) = row.grouped(layer)
        if pattern == "heads":
            _prune_units(into, out, model.config.num_attention_heads, sparsity)
        elif pattern == "neurons":
            _prune_units(first, second, _weight(second).shape[1], sparsity)
        else:
            _prune_blocks(layer, sparsity, pattern)
    return [_row(name, linear) for layer in layers for name, linear in layer.items()]


def kept(w: np.ndarray, sparsity: float, pattern: str) -> np.ndarray:
    """Which weights of w (K inputs, N outputs) stay, a mask of the same shape.

    Exactly round(sparsity × blocks) blocks go, those of the smallest sum of magnitudes; at least
    one stays.
    """
    magnitude = np.abs(w)
    if pattern == "2:4":
        groups = magnitude.reshape(-1, 4, w.shape[1])
        places = np.argsort(np.argsort(groups, axis=1, kind="stable"), axis=1)
        return (places >= 2).reshape(w.shape)
    inputs, outputs = BLOCKS.get(pattern, (1, 1))
    blocks = magnitude.reshape(w.shape[0] // inputs, inputs, w.shape[1] // outputs, outputs)
    stays = largest(blocks.sum((1, 3), dtype="float64"), sparsity)
    return stays.repeat(inputs, axis=0).repeat(outputs, axis=1)


def largest(scores: np.ndarray, sparsity: float) -> np.ndarray:
    """A mask of all scores but the round(sparsity × count) smallest; at least one stays."""
    count = min(round(sparsity * scores.size), scores.size - 1)
    stays = np.ones(scores.size, bool)
    if count:
        stays[np.argpartition(scores.ravel(), count - 1)[:count]] = False
    return stays.reshape(scores.shape)


def _prune_blocks(layer: dict[str, Any], sparsity: float, pattern: str) -> None:
    for name, linear in layer.items():
        w = _weight(linear).T
        sizes = (4, 1) if pattern == "2:4" else BLOCKS.get(pattern, (1, 1))
        for extent, size, what in zip(w.shape, sizes, ("inputs", "outputs")):
            if extent % size:
                raise UsageError(
                    f"pattern {pattern} needs a multiple of {size} {what}; {name} has {extent}",
                    "choose another pattern",
                )
        w[~kept(w, sparsity, pattern)] = 0


def _prune_units(into: list[Any], out: Any, count: int, sparsity: float) -> None:
    """Zero the weights of whole heads or neurons in the layers around them, and their biases.

    A layer into them may have several outputs of each, one whole set behind the other. One with
    fewer outputs than that is of heads that others share, and stays.
    """
    width = _weight(out).shape[1]
    into = [linear for linear in into if len(_weight(linear)) % width == 0]
    sums = [
        np.abs(_weight(linear)).sum(1, dtype="float64").reshape(-1, width).sum(0) for linear in into
    ]
    sums.append(np.abs(_weight(out)).sum(0, dtype="float64"))
    stays = largest(sum(sums).reshape(count, -1).sum(1), sparsity)
    gone = ~stays.repeat(width // count)
    _weight(out)[:, gone] = 0
    for linear in into:
        parts = [_weight(linear), *([] if linear.bias is None else [_array(linear.bias)])]
        for part in parts:
            part[np.tile(gone, len(part) // width)] = 0


def _row(name: str, linear: Any) -> Pruned:
    w = _weight(linear).T
    analysis = analyse(w)
    return Pruned(name, *w.shape, analysis.zeros, analysis.pattern)


def _weight(linear: Any) -> np.ndarray:
    """The weight of a linear layer, (outputs, inputs); GPT-2's layers hold it turned."""
    values = _array(linear.weight)
    return values.T if hasattr(linear, "nf") else values


def _array(parameter: Any) -> np.ndarray:
    """A parameter's values; writing to them changes it."""
    return parameter.detach().numpy()
