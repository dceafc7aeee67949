"""Folds lookups whose row is the same for every token into the table of positions."""

from __future__ import annotations

from typing import Any


def fold_constant(embeddings: Any, row: Any, *names: str) -> None:
    """Add `row` to every position's, in place of the lookups `names`, which give zero from now on.

    Every position is looked up once a token, so the sum is the same, and one lookup less is made.
    """
    import torch
    from torch import nn

    class Zero(nn.Module):
        def forward(self, ids: Any) -> Any:
            return torch.zeros((), device=ids.device)  # a tensor: ERNIE asks for its device

    positions = embeddings.position_embeddings.weight.detach()
    embeddings.position_embeddings = nn.Embedding.from_pretrained(positions + row.detach())
    for name in names:
        setattr(embeddings, name, Zero())


def fold_token_type(embeddings: Any) -> None:
    """Fold the only token type, or the first where types are no input."""
    row = embeddings.token_type_embeddings.weight[0]
    fold_constant(embeddings, row, "token_type_embeddings")
