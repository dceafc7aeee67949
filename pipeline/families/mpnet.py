"""Turns MPNet's bias by distance into one small table before an export.

transformers computes the buckets with logarithms for each pair of positions instead.
"""

from __future__ import annotations

from typing import Any


def tabulate_bias(model: Any) -> tuple[str, ...]:
    """Let the encoder look its bias up: row `key - query + last` of the table holds every head."""
    import torch
    from torch import nn

    encoder, config = model.base_model.encoder, model.config
    last = config.max_position_embeddings - 1
    buckets = encoder.relative_position_bucket(
        torch.arange(-last, last + 1), num_buckets=config.relative_attention_num_buckets
    )
    bias = encoder.relative_attention_bias.weight[buckets].detach()
    encoder.register_parameter("bias_by_distance", nn.Parameter(bias))
    encoder.register_buffer("all_positions", torch.arange(last + 1)[None])

    def look_up(hidden: Any) -> Any:
        # A slice, not a Range: the importer gives a Range an axis of its own.
        across = encoder.all_positions[:, : hidden.shape[1]]
        rows = across - across.transpose(0, 1) + last
        return nn.functional.embedding(rows, encoder.bias_by_distance).permute(2, 0, 1)[None]

    # Beside the class's method, not through nn.Module, which would keep the method first.
    encoder.__dict__["compute_position_bias"] = look_up
    return ()
