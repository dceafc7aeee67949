"""Spells RoFormer's rotary positions by halves of a head, as the kernels of attention know them.

    channels 0 1 2 3 4 5, turned in pairs (0, 1) (2, 3) (4, 5)
        →  channels 0 2 4 1 3 5, turned in pairs (0, 1) (2, 3) (4, 5) of the old ones

A score is a sum over the channels of a head, so their order is free as long as Q and K have the
same. It is brought into the weights, and nothing is left to do in a request.
"""

from __future__ import annotations

from typing import Any


def turn_halves(model: Any) -> tuple[str, ...]:
    """Reorder the channels of Q and K, and of V where it is turned too, in place."""
    import torch

    encoder = model.base_model.encoder
    # as the checkpoint has them: sines and then cosines of each place, one a pair of channels
    sines, cosines = encoder.embed_positions.weight.detach().chunk(2, dim=-1)
    angles = torch.cat([sines, sines, cosines, cosines], dim=-1)
    encoder.register_buffer("angles_of_places", angles[None, None])

    def look_up(shape: Any, past: int = 0, position_ids: Any = None) -> Any:
        return _Angles(encoder.angles_of_places[:, :, : shape[1]])

    # Beside the classes' methods, not through nn.Module, which would keep the methods first.
    encoder.embed_positions.__dict__["forward"] = look_up
    with torch.no_grad():
        for layer in encoder.layer:
            _reorder(layer.attention)
    return ()


class _Angles:
    """(1, 1, length, 2 D) of sines and cosines, to which the encoder would add its two axes."""

    def __init__(self, whole: Any) -> None:
        self.whole = whole

    def __getitem__(self, _: Any) -> Any:
        return self.whole


def _reorder(attention: Any) -> None:
    own = attention.self
    size = own.attention_head_size
    order = [*range(0, size, 2), *range(1, size, 2)]
    channels = [head * size + place for head in range(own.num_attention_heads) for place in order]
    for layer in (own.query, own.key, *([own.value] if own.rotary_value else [])):
        layer.weight.copy_(layer.weight[channels].clone())
        layer.bias.copy_(layer.bias[channels].clone())
    if own.rotary_value:
        after = attention.output.dense
        after.weight.copy_(after.weight[:, channels].clone())
    own.__dict__["apply_rotary_position_embeddings"] = _turned


def _turned(angles: Any, *heads: Any) -> tuple[Any, ...]:
    """Each of (B, H, S, D), turned by the angles of its places."""
    size = heads[0].shape[-1]
    sin, cos = angles[..., :size], angles[..., size:]
    return tuple(x * cos + _half_turned(x) * sin for x in heads)


def _half_turned(x: Any) -> Any:
    import torch

    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat([-second, first], dim=-1)
