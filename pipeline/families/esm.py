"""Spells ESM's embeddings without a mask of two axes, which an export adds to scores instead."""

from __future__ import annotations

from typing import Any

# Of the tokens that ESM was trained on, those that stood masked: transformers' code has the number.
MASKED_IN_TRAINING = 0.15 * 0.8


def spell_embeddings(model: Any) -> tuple[str, ...]:
    """Replace the embeddings' forward, in place.

    With `token_dropout` a masked token's vector is zero, and a row's vectors are larger the more of
    its tokens are masked; the zeros and the part of the factor that all rows share go into the
    table.
    """
    from torch import nn

    embeddings = model.base_model.embeddings
    masked = embeddings.mask_token_id
    # a table of its own: a head may share the old one
    words = embeddings.word_embeddings.weight.detach().clone()
    if embeddings.token_dropout:
        words[masked] = 0
        words *= 1 - MASKED_IN_TRAINING
    table = nn.Embedding.from_pretrained(words)
    embeddings.word_embeddings = table

    def forward(input_ids: Any, attention_mask: Any, position_ids: Any = None, **_: Any) -> Any:
        real = _real(attention_mask)
        vectors = table(input_ids)
        if embeddings.token_dropout:
            seen = (input_ids != masked).float() * real
            vectors = vectors * (real.sum(-1) / seen.sum(-1))[:, None, None]
        if embeddings.position_embedding_type == "absolute":
            vectors = vectors + embeddings.position_embeddings(position_ids)
        if embeddings.layer_norm is not None:
            vectors = embeddings.layer_norm(vectors)
        return vectors * real[:, :, None]

    # Beside the class's method, not through nn.Module, which would keep the method first.
    embeddings.__dict__["forward"] = forward
    return ()


def _real(mask: Any) -> Any:
    """1.0 at real tokens, of a mask (batch, length) or one that is added to scores."""
    return (mask[:, 0, 0] == 0).float() if mask.dim() == 4 else mask.float()
