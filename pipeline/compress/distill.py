"""Says how far a student's answers are from its teacher's: losses, each a sum over a batch.

Soft targets are Hinton et al. 2015, hidden states and attention maps TinyBERT's (Jiao et al. 2020),
of the probabilities that transformers gives. A student of fewer layers learns from evenly chosen
ones of the teacher; one that is narrower through a matrix that is trained with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bertile.compress.recipe import Distill


class Distillation(nn.Module):
    """The losses of a recipe; what widens hidden states is trained with the student."""

    def __init__(
        self, distill: Distill, outputs: Sequence[str], student: Any, teacher: Any
    ) -> None:
        super().__init__()
        self.distill, self.outputs = distill, tuple(outputs)
        self.hidden = distill.hidden > 0
        self.attention = distill.attention > 0
        narrow, wide = student.config.hidden_size, teacher.config.hidden_size
        self.widen = nn.Identity()
        if self.hidden and narrow != wide:
            self.widen = nn.Linear(narrow, wide, bias=False)

    def forward(self, mine: Mapping[str, Any], theirs: Mapping[str, Any], mask: Tensor) -> Tensor:
        """The mean loss of each text, (batch,); `mask` is 1 at real tokens."""
        distill = self.distill
        total = mask.new_zeros(len(mask), dtype=torch.float32)
        for name in self.outputs:
            if name == "sentence_embedding":
                total = total + distill.cosine * away(mine[name], theirs[name])
            elif distill.soft:
                total = total + distill.soft * soft(
                    mine[name], theirs[name], mask, distill.temperature
                )
        if self.hidden:
            states = evenly(theirs["hidden_states"], len(mine["hidden_states"]))
            for state, wanted in zip(mine["hidden_states"], states):
                total = total + distill.hidden * apart(self.widen(state), wanted, mask)
        if self.attention:
            maps = evenly(theirs["attentions"], len(mine["attentions"]), skip=0)
            for weights, wanted in zip(mine["attentions"], maps):
                total = total + distill.attention * _maps_apart(weights, wanted, mask)
        return total


def soft(logits: Tensor, wanted: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """The divergence from the teacher's softened probabilities, (batch,).

    Logits are (batch, labels), (batch, length) of positions, or (batch, length, labels), of which
    each text has the mean over its real tokens.
    """
    if logits.shape == mask.shape:  # a position, which padding cannot be
        logits, wanted = (x.masked_fill(mask == 0, -1e4) for x in (logits, wanted))
    mine = F.log_softmax(logits.float() / temperature, -1)
    theirs = F.log_softmax(wanted.float() / temperature, -1)
    divergence = F.kl_div(mine, theirs, log_target=True, reduction="none").sum(-1)
    if divergence.dim() == 2:
        divergence = _over_tokens(divergence, mask)
    return divergence * temperature**2


def apart(state: Tensor, wanted: Tensor, mask: Tensor) -> Tensor:
    """The mean squared difference of hidden states (batch, length, channels), (batch,)."""
    return _over_tokens((state - wanted).square().mean(-1), mask)


def away(vectors: Tensor, wanted: Tensor) -> Tensor:
    """One less the cosine, (batch,)."""
    return 1 - F.cosine_similarity(vectors, wanted, dim=-1)


def similarities(vectors: Tensor, wanted: Tensor, others: Tensor, their_others: Tensor) -> Tensor:
    """The mean squared difference of the cosines of each text to all of a batch, (texts,).

    `others` are the vectors of the whole batch, of which `vectors` are some.
    """
    mine, all_mine, theirs, all_theirs = (
        F.normalize(x, dim=-1) for x in (vectors, others, wanted, their_others)
    )
    return (mine @ all_mine.T - theirs @ all_theirs.T).square().mean(-1)


def evenly(teacher: Sequence[Tensor], count: int, skip: int = 1) -> list[Tensor]:
    """Of the teacher's layers as many as the student's, the last with the last; of hidden states
    the first, which is the embedding's, with the first.
    """
    layers, mine = len(teacher) - skip, count - skip
    places = [skip + (index + 1) * layers // mine - 1 for index in range(mine)]
    return [*teacher[:skip], *(teacher[place] for place in places)]


def _maps_apart(weights: Tensor, wanted: Tensor, mask: Tensor) -> Tensor:
    """The squared difference of attention (batch, heads, length, length), (batch,)."""
    return _over_tokens((weights - wanted).square().sum(-1).mean(1), mask)


def _over_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """The mean over real tokens of (batch, length)."""
    return (values * mask).sum(1) / mask.sum(1).clamp(min=1)
