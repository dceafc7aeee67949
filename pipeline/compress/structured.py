"""Finds the attention heads and the neurons that a model needs least, and takes their weights away.

The effect of a unit is how much the loss would change without it, to first order: |x · ∂loss/∂x|,
summed over its channels of each token (Michel et al. 2019, Molchanov et al. 2017). All layers are
ranked together; each keeps one unit at least. A compile removes what is left of no use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bertile.compress.masks import Held
from bertile.compress.recipe import Structured
from bertile.families.family import Family

Loss = Callable[[Any], Tensor]


def remove(
    model: nn.Module, family: Family, structured: Structured, batches: Iterable[Any], loss: Loss
) -> dict[str, int]:
    """Hold the weights of the least units at zero, by masks; gives how many went of each kind.

    `loss` is of a batch, with gradients. Units are chosen once, by the first
    `structured.batches`.
    """
    kinds = {"heads": structured.heads, "neurons": structured.neurons}
    units = [
        (kind, into, out, width)
        for layer in family.encoder_layers(model)
        for kind, into, out, width in _units(model, family.grouped(layer))
        if kinds[kind]
    ]
    effects = _effects(model, [(out, width) for _, _, out, width in units], batches, loss)
    gone = dict.fromkeys(kinds, 0)
    for kind, share in kinds.items():
        mine = [place for place, unit in enumerate(units) if unit[0] == kind]
        for place, stays in zip(mine, _ranked([effects[place] for place in mine], share)):
            _, into, out, width = units[place]
            _hold(into, out, stays.repeat_interleave(width))
            gone[kind] += int((~stays).sum())
    return gone


def _units(model: nn.Module, grouped: Any) -> Iterator[tuple[str, list[nn.Linear], Any, int]]:
    """The layers that make heads, and neurons, and the one that reads them; channels of a unit."""
    into, (out,), first, (second,) = grouped
    yield "heads", into, out, out.in_features // model.config.num_attention_heads
    yield "neurons", first, second, 1


def _effects(
    model: nn.Module, reading: list[tuple[nn.Linear, int]], batches: Iterable[Any], loss: Loss
) -> list[Tensor]:
    """The effect of each unit (units,) of the layers that read them."""
    totals = [torch.zeros(out.in_features // width) for out, width in reading]

    def hook(place: int, width: int) -> Any:
        def see(linear: nn.Module, arguments: tuple[Any, ...]) -> None:
            x = arguments[0]

            def add(gradient: Tensor) -> None:
                effect = (x.detach() * gradient).reshape(-1, len(totals[place]), width).sum(-1)
                totals[place] += effect.abs().sum(0).cpu()

            if x.requires_grad:
                x.register_hook(add)

        return see

    hooks = [
        out.register_forward_pre_hook(hook(place, width))
        for place, (out, width) in enumerate(reading)
    ]
    training = model.training
    try:
        model.eval()
        for batch in batches:
            loss(batch).backward()
            model.zero_grad(set_to_none=True)
    finally:
        model.train(training)
        for handle in hooks:
            handle.remove()
    return totals


def _ranked(effects: list[Tensor], share: float) -> list[Tensor]:
    """Which units of each layer stay: all but round(share × all) of least effect.

    Layers are of one scale when each is divided by its own norm (Michel et al. 2019).
    """
    scaled = [effect / effect.norm().clamp(min=1e-12) for effect in effects]
    stays = [torch.ones(len(effect), dtype=torch.bool) for effect in effects]
    order = sorted(
        (
            (float(value), layer, unit)
            for layer, row in enumerate(scaled)
            for unit, value in enumerate(row)
        )
    )
    left = round(share * len(order))
    for _, layer, unit in order:
        if left and int(stays[layer].sum()) > 1:
            stays[layer][unit] = False
            left -= 1
    return stays


def _hold(into: list[nn.Linear], out: nn.Linear, channels: Tensor) -> None:
    """Keep at zero what makes and what reads the channels that do not stay."""
    width = out.in_features
    mask = channels[None, :].expand(out.out_features, width)
    parametrize.register_parametrization(out, "weight", Held(mask))
    for linear in into:
        rows = channels.repeat(linear.out_features // width)
        mask = rows[:, None].expand(linear.out_features, linear.in_features)
        parametrize.register_parametrization(linear, "weight", Held(mask))
        if linear.bias is not None:
            parametrize.register_parametrization(linear, "bias", Held(rows))
