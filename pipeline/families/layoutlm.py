"""Lets a LayoutLM model take the mask that an export adds to scores."""

from __future__ import annotations

from typing import Any


def take_mask(model: Any) -> tuple[str, ...]:
    """Replace the base model's own forward, which builds its mask from one of two axes, in place.

    In its place comes one that takes the mask as it is, like other families', and that does without
    a pooler where there is none.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    base = model.base_model
    embeddings = base.embeddings

    def forward(
        input_ids: Any,
        bbox: Any = None,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        **others: Any,
    ) -> Any:
        embedded = embeddings(input_ids, bbox=bbox, token_type_ids=token_type_ids)
        hidden = base.encoder(embedded, attention_mask).last_hidden_state
        pooled = None if base.pooler is None else base.pooler(hidden)
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled)

    # Beside the class's method, not through nn.Module, which would keep the method first.
    base.__dict__["forward"] = forward
    return ()
