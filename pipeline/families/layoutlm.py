"""Lets a LayoutLM model read texts without boxes."""

from __future__ import annotations

from typing import Any

from bertile.families.embeddings import fold_constant


def leave_boxes_out(model: Any) -> tuple[str, ...]:
    """Take every token's box as zeros, as transformers does where none is given.

    The rows that such a box looks up are the same for every token. The base model's own forward
    builds its mask from a 2-D one; in its place comes one that takes the mask as it is, like other
    families', and that does without a pooler where there is none.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    base = model.base_model
    embeddings = base.embeddings
    x, y, height, width = (
        getattr(embeddings, f"{side}_position_embeddings").weight[0] for side in "xyhw"
    )
    sides = (f"{side}_position_embeddings" for side in "xyhw")
    # the left and the right edge are looked up in x, the upper and the lower one in y
    fold_constant(embeddings, 2 * x + 2 * y + height + width, *sides)

    def forward(
        input_ids: Any,
        bbox: Any = None,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        **others: Any,
    ) -> Any:
        boxes = input_ids.new_zeros((*input_ids.shape, 4))
        embedded = embeddings(input_ids, bbox=boxes, token_type_ids=token_type_ids)
        hidden = base.encoder(embedded, attention_mask).last_hidden_state
        pooled = None if base.pooler is None else base.pooler(hidden)
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled)

    # Beside the class's method, not through nn.Module, which would keep the method first.
    base.__dict__["forward"] = forward
    return ("boxes are not an input: every token's is zeros",)
