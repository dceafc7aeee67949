"""Makes room in a model for layers whose heads were removed for good.

Older versions of transformers saved such models with `pruned_heads` in config.json; newer ones
build all heads, into which the smaller weights do not fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bertile.base.errors import ModelError
from bertile.families.family import BY_ANGLE, BY_DISTANCE, Family

_COUNTS = ("num_attention_heads", "n_heads")  # what a family's attention calls its heads


def class_without(kind: type, family: Family, removed: Mapping[str, Sequence[int]]) -> type:
    """A class like `kind`, of transformers, whose models lack the heads `removed`, by layer."""

    def build(self: Any, *positional: Any, **keywords: Any) -> None:
        kind.__init__(self, *positional, **keywords)
        remove(self, family, removed)

    return type(kind.__name__, (kind,), {"__init__": build})


def remove(model: Any, family: Family, removed: Mapping[str, Sequence[int]]) -> None:
    """Make Q, K, V and the attention's output smaller, in place; their new weights are arbitrary.

    ModelError for a layer or a head that there is not, or where no head would be left.
    """
    if family.positions in (BY_ANGLE, BY_DISTANCE) or family.causal:
        raise ModelError(
            f"pruned_heads of {family.title} is unsupported", "compile the whole model"
        )
    layers = family.encoder_layers(model)
    for layer, heads in removed.items():
        if int(layer) >= len(layers):
            raise ModelError(f"pruned_heads names layer {layer}, the model has {len(layers)}")
        names = list(layers[int(layer)])[:4]
        attention = model.base_model.get_submodule(names[0].rpartition(".")[0])
        attribute = next(name for name in _COUNTS if hasattr(attention, name))
        count, width = getattr(attention, attribute), attention.attention_head_size
        left = count - len(set(heads))
        if left < 1 or max(heads, default=0) >= count:
            raise ModelError(
                f"pruned_heads names {heads} of layer {layer}, which has {count} heads"
            )
        setattr(attention, attribute, left)
        if hasattr(attention, "all_head_size"):
            attention.all_head_size = left * width
        for name in names[:3]:
            _resize(model.base_model, name, outputs=left * width)
        _resize(model.base_model, names[3], inputs=left * width)


def _resize(model: Any, name: str, inputs: int | None = None, outputs: int | None = None) -> None:
    linear = model.get_submodule(name)
    place, _, own = name.rpartition(".")
    smaller = type(linear)(
        inputs or linear.in_features,
        outputs or linear.out_features,
        bias=linear.bias is not None,
        device=linear.weight.device,
        dtype=linear.weight.dtype,
    )
    setattr(model.get_submodule(place), own, smaller)
