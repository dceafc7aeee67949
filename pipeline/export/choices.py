"""Lets a model that chooses between texts score each text by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
NOTE = "each row is a choice of its own, with one logit: compare those of one question's choices"


def score_rows(model: Any) -> None:
    """Let a multiple-choice model take (batch, length) beside (batch, choices, length), in place.

    A row is an only choice then, and logits are (batch, 1). Hooks, not another forward: a copy of
    the model keeps them.
    """
    rows = _Rows()
    model.register_forward_pre_hook(rows.as_only_choices, with_kwargs=True)
    model.base_model.register_forward_pre_hook(rows.as_they_were, with_kwargs=True)


class _Rows:
    """Carries rows past the head, which would flatten them and a mask of any form."""

    def __init__(self) -> None:
        self._rows: Mapping[str, Any] = {}

    def as_only_choices(self, _: Any, positional: tuple[Any, ...], keywords: Any) -> Any:
        ids = keywords.get("input_ids")
        if ids is None or ids.ndim != 2:
            return None
        self._rows = {name: keywords[name] for name in INPUTS if name in keywords}
        return positional, {**keywords, **{k: v.unsqueeze(1) for k, v in self._rows.items()}}

    def as_they_were(self, _: Any, positional: tuple[Any, ...], keywords: Any) -> Any:
        rows, self._rows = self._rows, {}
        # Some heads hand on the ids, and nothing else, by their position.
        return positional[1:] if rows else positional, {**keywords, **rows}
