"""Settles the kind of task that an ERNIE model is told of."""

from __future__ import annotations

from typing import Any

from bertile.families.embeddings import fold_constant


def fold_task_type(model: Any) -> tuple[str, ...]:
    """Take task 0 for every token, as transformers does where none is given."""
    embeddings = model.base_model.embeddings
    if not embeddings.use_task_id:
        return ()
    fold_constant(embeddings, embeddings.task_type_embeddings.weight[0], "task_type_embeddings")
    return ("task types are not an input: every token is of task 0",)
