"""Spells DeBERTa's attention so that an export shows three products and two tables by distance.

    scores(i, j) = (q_i · k_j + q_i · keys[row(i - j)] + k_j · queries[row(i - j)]) scale + mask_j

transformers projects the vectors of distances in each request, and computes the row of every pair
of tokens for each row of the batch. Neither depends on a request: both become tables here.
"""

from __future__ import annotations

import sys
from typing import Any

from bertile.families.family import WITHOUT_TABLE, has_places

CLOSED = -1e29  # what is added to the scores of a key that is not seen


def spell_attention(model: Any) -> tuple[str, ...]:
    """Replace the attention of each layer, in place."""
    import torch

    base = model.base_model
    encoder, embeddings = base.encoder, base.embeddings
    vectors = encoder.get_rel_embedding()
    sees_distances = vectors is not None
    count = len(vectors) if sees_distances else 0
    longest = model.config.max_position_embeddings if has_places(model) else WITHOUT_TABLE
    look_up = type(embeddings).forward

    def embed(input_ids: Any = None, token_type_ids: Any = None, **others: Any) -> Any:
        # without the mask, which would make zeros of padding: nobody sees that
        return look_up(embeddings, input_ids=input_ids, token_type_ids=token_type_ids)

    def added(mask: Any) -> Any:
        return mask if mask.dim() == 4 else (1.0 - mask[:, None, None, :].float()) * CLOSED

    def places(hidden: Any, query_states: Any = None, relative_pos: Any = None) -> Any:
        if not sees_distances:
            return None
        # a slice, not a Range: the importer gives a Range an axis of its own
        across = encoder.all_positions[:, : hidden.shape[1]]
        down = across.transpose(0, 1)
        row = encoder.row_of_distance[down - across + (longest - 1)]
        return row + down * count, row + across * count

    # Beside the classes' methods, not through nn.Module, which would keep the methods first.
    embeddings.__dict__["forward"] = embed
    encoder.__dict__["get_attention_mask"] = added
    encoder.__dict__["get_rel_pos"] = places
    encoder.__dict__["get_rel_embedding"] = lambda: None
    with torch.no_grad():
        if sees_distances:
            rows = _row_of_distance(encoder.layer[0].attention.self, count, longest - 1)
            encoder.register_buffer("row_of_distance", rows)
            encoder.register_buffer("all_positions", torch.arange(longest)[None])
        for layer in encoder.layer:
            _spell(layer.attention.self, vectors)
        _write_norms(base)
    return ()


def _write_norms(base: Any) -> None:
    """Make torch's LayerNorm of DeBERTa's own, which spells the same in parts."""
    from torch import nn

    for parent in list(base.modules()):
        for name, child in list(parent.named_children()):
            if hasattr(child, "variance_epsilon"):
                norm = nn.LayerNorm(len(child.weight), eps=child.variance_epsilon)
                norm.load_state_dict(child.state_dict())
                setattr(parent, name, norm)


def must_be_known(model: Any) -> None:
    """ModelError for what has no export here."""
    from bertile.base.errors import ModelError  # brings numpy

    encoder = model.base_model.encoder
    if getattr(encoder, "conv", None) is not None:
        raise ModelError(
            "the convolution behind the first layer (conv_kernel_size) is unsupported",
            "of DeBERTa-v2 the xlarge and xxlarge models have it; v3 does not",
        )
    if getattr(encoder.layer[0].attention.self, "talking_head", False):
        raise ModelError("attention whose heads are mixed (talking_head) is unsupported")


def _row_of_distance(attention: Any, count: int, last: int) -> Any:
    """The row, of ``count``, of each distance query - key from -last to last; int64 (2 last + 1).

    Those of the middle are one each, those farther away share one, the more the farther (log
    buckets), and behind the last bucket all are one.
    """
    import torch

    half = count // 2
    buckets, most = getattr(attention, "position_buckets", -1), attention.max_relative_positions
    distance = torch.arange(-last, last + 1)
    if buckets > 0:
        code = sys.modules[type(attention).__module__]
        distance = code.make_log_bucket_position(distance, buckets, most).to(torch.int64)
    return (distance + half).clamp(0, count - 1)


def _spell(attention: Any, vectors: Any) -> None:
    """Give one layer's attention a forward of its own, on its own tables; ``vectors`` (rows, C) are
    those of the distances, None where it has none.
    """
    import torch
    from torch import nn

    heads, kinds = attention.num_attention_heads, tuple(attention.pos_att_type)
    query, key, value = _layers(attention)
    names = []
    if vectors is not None:
        # DeBERTa's names: content to position, position to content
        for kind, name, own in (("c2p", "keys", key), ("p2c", "queries", query)):
            if kind in kinds:
                layer = _projection(attention, kind, own)
                table = layer(vectors).reshape(len(vectors), heads, -1)
                table = nn.Parameter(table.permute(1, 2, 0)[None].contiguous())
                attention.register_parameter(f"{name}_by_distance", table)
                names.append(name)
    scale = (attention.attention_head_size * _terms(attention, kinds)) ** -0.5

    def heads_of(x: Any) -> Any:
        return x.reshape(*x.shape[:2], heads, -1).permute(0, 2, 1, 3)

    def forward(
        hidden: Any, mask: Any, output_attentions: bool = False, relative_pos: Any = None, **_: Any
    ) -> Any:
        q, k, v = heads_of(query(hidden)), heads_of(key(hidden)), heads_of(value(hidden))
        scores = torch.matmul(q, k.transpose(-1, -2))
        if "keys" in names:
            scores = scores + _picked(torch.matmul(q, attention.keys_by_distance), relative_pos[0])
        if "queries" in names:
            products = torch.matmul(k, attention.queries_by_distance)
            scores = scores + _picked(products, relative_pos[1])
        weights = (scores * scale + mask).softmax(-1)
        context = torch.matmul(weights, v).permute(0, 2, 1, 3)
        context = context.reshape(*hidden.shape[:2], -1)
        return context, weights if output_attentions else None

    attention.__dict__["forward"] = forward


def _picked(products: Any, places: Any) -> Any:
    """(B, H, S, rows) → (B, H, S, S), by the place of each pair's product in those of a head."""
    return products.flatten(2)[:, :, places]


def _layers(attention: Any) -> tuple[Any, Any, Any]:
    """Q, K and V, a linear layer each; DeBERTa's own has them together, head by head."""
    import torch
    from torch import nn

    if hasattr(attention, "query_proj"):
        return attention.query_proj, attention.key_proj, attention.value_proj
    heads, inputs = attention.num_attention_heads, attention.in_proj.in_features
    weights = attention.in_proj.weight.reshape(heads, 3, -1, inputs).unbind(1)
    biases = (attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias)
    for name, weight, bias in zip(("query", "key", "value"), weights, biases):
        layer = nn.Linear(inputs, len(bias))
        layer.load_state_dict({"weight": weight.reshape(-1, inputs), "bias": bias})
        setattr(attention, name, layer)
    return attention.query, attention.key, attention.value


def _projection(attention: Any, kind: str, own: Any) -> Any:
    """The linear layer that makes keys (c2p) or queries (p2c) of the vectors of distances."""
    if getattr(attention, "share_att_key", False):
        return own
    names = {"c2p": ("pos_key_proj", "pos_proj"), "p2c": ("pos_query_proj", "pos_q_proj")}[kind]
    return next(getattr(attention, name) for name in names if hasattr(attention, name))


def _terms(attention: Any, kinds: tuple[str, ...]) -> int:
    """How many terms the scale of the scores counts, whether or not the model computes them."""
    if hasattr(attention, "in_proj"):
        return 1 + len(kinds)
    return 1 + ("c2p" in kinds) + ("p2c" in kinds)
