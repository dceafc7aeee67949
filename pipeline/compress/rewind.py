"""Goes back to early weights with late zeros: lottery tickets (Frankle et al. 2020)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bertile.compress.masks import Pruning


class Rewind:
    """Keeps all weights at the step `early`, and puts them back behind the last change of masks."""

    def __init__(self, model: nn.Module, pruning: Pruning, early: int) -> None:
        self.model, self.early, self.late = model, early, pruning.end + 1
        self._left_out = {id(scores) for scores in pruning.scores()}
        self.kept: dict[str, torch.Tensor] | None = None

    def at(self, step: int) -> None:
        """Keep, or put back, where it is time."""
        if step == self.early and self.kept is None:
            self.kept = {name: value.detach().clone() for name, value in self._weights()}
        elif step == self.late and self.kept:
            with torch.no_grad():
                for name, value in self._weights():
                    value.copy_(self.kept[name])
            self.kept = {}  # once

    def state(self) -> Any:
        """What a run that goes on needs to know."""
        return self.kept

    def load_state(self, kept: Any) -> None:
        """Go on with what `state` gave."""
        self.kept = kept

    def _weights(self) -> Any:
        named = self.model.named_parameters()
        return ((name, value) for name, value in named if id(value) not in self._left_out)
