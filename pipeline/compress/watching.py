"""Shows what comes into linear layers while a model answers batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def watch_inputs(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    batches: Sequence[Mapping[str, Tensor]],
    see: Callable[[str, Tensor], None],
) -> None:
    """Run the batches, and call `see` with a layer's name and what came into it: (tokens, inputs)
    of the real tokens. The model stays in the mode that it is in.
    """

    def hook(name: str, mask: Tensor) -> Any:
        def shown(linear: nn.Module, arguments: tuple[Any, ...]) -> None:
            see(name, arguments[0].detach()[mask.bool()])

        return shown

    for batch in batches:
        hooks = [
            linear.register_forward_pre_hook(hook(name, batch["attention_mask"]))
            for name, linear in linears.items()
        ]
        try:
            with torch.no_grad():
                model(**batch)
        finally:
            for handle in hooks:
                handle.remove()
