"""Lets a model that chooses between texts score each text by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NOTE = "each row is a choice of its own, with one logit: compare those of one question's choices"


def score_rows(model: Any) -> None:
    """Let a multiple-choice model take (batch, length) beside (batch, choices, length), in place.

    A row is an only choice then, and logits are (batch, 1). Hooks, not another forward: a copy of
    the model keeps them.
    """
    model.register_forward_pre_hook(_as_only_choices, with_kwargs=True)
    model.base_model.register_forward_pre_hook(_mask_as_it_was, with_kwargs=True)


def _as_only_choices(_: Any, positional: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
    def only(value: Any) -> Any:
        return value[:, None] if getattr(value, "ndim", 0) == 2 else value

    return tuple(map(only, positional)), {name: only(value) for name, value in keywords.items()}


def _mask_as_it_was(_: Any, positional: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
    """The additive mask (batch, 1, 1, length), which the head has made (batch, length)."""
    mask = keywords.get("attention_mask")
    if mask is not None and mask.is_floating_point() and mask.ndim == 2:
        keywords = {**keywords, "attention_mask": mask[:, None, None]}
    return positional, keywords
