"""Puts heads behind early layers of a classifier, and cuts it into models that end there.

A head is what the model itself has behind its last layer, begun with the same weights. It learns
from the last head's answers (self-distillation, Zhang et al. 2019) while the whole model trains.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bertile.base.errors import UsageError
from bertile.base.quiet import quiet
from bertile.compress import students
from bertile.compress.recipe import EarlyExit
from bertile.families.family import Family

DIRECTORY = "exits"


class _Given(nn.Module):
    """Stands for a model's embeddings, and gives the states that it was handed."""

    states: Tensor | None = None

    def forward(self, *_: Any, **__: Any) -> Tensor | None:
        return self.states


class Head(nn.Module):
    """The logits from the hidden states behind the first `layers` encoder layers."""

    def __init__(self, model: Any, family: Family, layers: int) -> None:
        super().__init__()
        self.layers = layers
        parent, name, encoder = students.layer_list(model, family)
        embeddings = model.base_model.embeddings
        setattr(parent, name, nn.ModuleList())
        model.base_model.embeddings = _Given()
        try:  # of a copy without both, what is left is the head
            self.model = copy.deepcopy(model)
        finally:
            setattr(parent, name, encoder)
            model.base_model.embeddings = embeddings

    def forward(self, states: tuple[Tensor, ...], inputs: dict[str, Tensor]) -> Tensor:
        self.model.base_model.embeddings.states = states[self.layers]
        return self.model(**inputs, return_dict=True)["logits"]


def heads(model: Any, family: Family, early_exit: EarlyExit) -> nn.ModuleList:
    """A head for each layer that a recipe names; UsageError for one that is not before the last."""
    _, _, encoder = students.layer_list(model, family)
    for layer in early_exit.layers:
        if not 0 < layer < len(encoder):
            raise UsageError(
                f"early_exit.layers has {layer}, of a model with {len(encoder)} layers",
                f"give numbers from 1 to {len(encoder) - 1}",
            )
    return nn.ModuleList(Head(model, family, layer) for layer in sorted(set(early_exit.layers)))


def write(exits: nn.ModuleList, model: Any, family: Family, directory: Path) -> list[str]:
    """Write a model for each early head: the layers before it, and the head; their directories.

    `model` is the whole one; both have plain parameters by now.
    """
    places = []
    _, _, encoder = students.layer_list(model, family)
    for head in exits:
        short = head.model
        short_parent, short_name, _ = students.layer_list(model, family, short)
        setattr(short_parent, short_name, encoder[: head.layers])
        short.base_model.embeddings = model.base_model.embeddings
        short.config.num_hidden_layers = head.layers
        places.append(f"{DIRECTORY}/{head.layers}")
        with quiet():
            short.save_pretrained(directory / DIRECTORY / str(head.layers))
    return places
