"""Makes a student of a model by leaving out encoder layers, as DistilBERT begins (Sanh 2019)."""

from __future__ import annotations

from typing import Any

from torch import nn

from bertile.base.errors import UsageError
from bertile.compress.recipe import Depth
from bertile.export.encoder_layers import layer_list
from bertile.families.family import Family


def shorten(model: Any, family: Family, depth: Depth) -> tuple[int, ...]:
    """Leave out encoder layers in place; gives the places of those that stay, from 0.

    Raises UsageError for more layers than there are, and for a model whose layers are shared or of
    several kinds.
    """
    parent, name, layers = layer_list(model, family)
    kinds = getattr(model.config, "layer_types", None) or ()
    if len(set(kinds)) > 1:
        raise UsageError(
            f"the layers of a {family.title} are of several kinds, so none can be left out"
        )
    keep = depth.keep if depth.keep is not None else evenly(len(layers), int(depth.layers or 0))
    if not keep or max(keep) >= len(layers) or len(set(keep)) != len(keep):
        raise UsageError(
            f"depth keeps the layers {', '.join(map(str, keep)) or 'none'} of {len(layers)}",
            f"give different numbers from 0 to {len(layers) - 1}",
        )
    setattr(parent, name, nn.ModuleList(layers[place] for place in sorted(keep)))
    model.config.num_hidden_layers = len(keep)
    if kinds:
        model.config.layer_types = list(kinds[: len(keep)])
    return tuple(sorted(keep))


def evenly(count: int, wanted: int) -> tuple[int, ...]:
    """`wanted` of `count` layers, the first and the last among them."""
    if not 0 < wanted <= count:
        raise UsageError(
            f"depth wants {wanted} of {count} layers", f"give a number from 1 to {count}"
        )
    if wanted == 1:
        return (count - 1,)
    return tuple(round(place * (count - 1) / (wanted - 1)) for place in range(wanted))
