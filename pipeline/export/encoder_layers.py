"""Finds the list that holds the encoder layers of a torch model."""

from __future__ import annotations

from typing import Any

from bertile.base.errors import UsageError
from bertile.families.family import Family


def layer_list(model: Any, family: Family, other: Any = None) -> tuple[Any, str, Any]:
    """The module list of a model's encoder layers behind the module it hangs at and its name there,
    or that of another model of the same form.

    UsageError for a model that has none.
    """
    layers = family.encoder_layers(model)
    first = next(iter(layers[0]))
    parts = first.removesuffix(f".{family.layers[0]}").split(".")
    if not parts[-1].isdigit() or len(layers) != model.config.num_hidden_layers:
        raise UsageError(f"a {family.title} of this form has no list of layers of its own")
    parent = (other or model).base_model.get_submodule(".".join(parts[:-2]))
    return parent, parts[-2], getattr(parent, parts[-2])
