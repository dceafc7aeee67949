"""Puts heads behind early layers of a classifier, so that a text whose answer is sure by then needs
no more of them.

A head is what the model itself has behind its last layer, with weights of its own, which lie beside
the model's in FILE: `2.classifier.weight` is that of the head behind the second layer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bertile.base.errors import ModelError, UsageError
from bertile.export.encoder_layers import layer_list
from bertile.export.files import EXITS
from bertile.families.family import Family


class _Given(nn.Module):
    """Stands for a model's embeddings, and gives the states that it was handed.

    They lie in a plain object: torch's exporter allows no module another tensor while it looks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = SimpleNamespace(states=None)

    def forward(self, *_: Any, **__: Any) -> Tensor | None:
        return self.held.states


class Head(nn.Module):
    """The logits from the hidden states behind the first `layers` encoder layers."""

    def __init__(self, model: Any, family: Family, layers: int) -> None:
        super().__init__()
        self.layers = layers
        parent, name, encoder = layer_list(model, family)
        embeddings = model.base_model.embeddings
        setattr(parent, name, nn.ModuleList())
        model.base_model.embeddings = _Given()
        try:  # of a copy without both, what is left is the head
            self.model = copy.deepcopy(model)
        finally:
            setattr(parent, name, encoder)
            model.base_model.embeddings = embeddings

    def forward(self, states: Sequence[Tensor], inputs: dict[str, Tensor]) -> Tensor:
        """The logits (batch, labels); `states` are the model's hidden states, the embedding's
        first.
        """
        self.model.base_model.embeddings.held.states = states[self.layers]
        return self.model(**inputs, return_dict=True)["logits"]


def heads(model: Any, family: Family, layers: Sequence[int]) -> nn.ModuleList:
    """A head behind each of these layers, counted from 1, begun with the model's own weights.

    UsageError for a layer that is not before the last.
    """
    _, _, encoder = layer_list(model, family)
    for layer in layers:
        if not 0 < layer < len(encoder):
            raise UsageError(
                f"early_exit.layers has {layer}, of a model with {len(encoder)} layers",
                f"give numbers from 1 to {len(encoder) - 1}",
            )
    return nn.ModuleList(Head(model, family, layer) for layer in sorted(set(layers)))


def write(exits: nn.ModuleList, directory: Path) -> None:
    """Write the weights of heads, plain parameters by now, beside their model's."""
    tensors = {
        f"{head.layers}.{name}": tensor.detach().contiguous()
        for head in exits
        for name, tensor in head.model.state_dict().items()
    }
    save_file(tensors, directory / EXITS)


def read(model: Any, family: Family, directory: Path) -> nn.ModuleList:
    """The heads that lie beside a model's weights; ModelError for what is no heads of this one."""
    path = directory / EXITS
    try:
        tensors = load_file(path)
        numbers = sorted({int(name.partition(".")[0]) for name in tensors})
        exits = heads(model, family, numbers)
        with torch.no_grad():
            for head in exits:
                prefix = f"{head.layers}."
                own = {
                    n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)
                }
                head.model.load_state_dict(own)
    except Exception as error:  # whatever a damaged file makes the libraries raise
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"'{path}' has no early heads of its model: {reason}", "train them again"
        ) from error
    return exits.eval()
