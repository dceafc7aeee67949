"""A transformers model comes in; a torch module with plain inputs, outputs and masks goes out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import activations

from bertile.export.checkpoints import AFTER_PADDING, Checkpoint
from bertile.export.files import Pooling

MASKED = -10000.0  # exp() of it is 0 in float32, and float16 can hold it


class Exportable(nn.Module):
    """The forward that is exported: (batch, length) integers in, float32 tensors out.

    transformers would build the attention mask with data-dependent code that the ONNX importer
    cannot follow, so the mask is built here, in the 4-D additive form that eager attention takes
    as it is in every family.
    """

    def __init__(self, checkpoint: Checkpoint, inputs: tuple[str, ...], outputs: tuple[str, ...]):
        super().__init__()
        self.model = checkpoint.model
        self.pooling = checkpoint.pooling
        self.inputs = inputs
        self.outputs = outputs
        self.padding_id = None
        if checkpoint.family in AFTER_PADDING:
            self.padding_id = int(self.model.base_model.embeddings.padding_idx)
        _simplify(self.model, checkpoint, "token_type_ids" in inputs)
        self.eval()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        mask = attention_mask.to(torch.float32)
        keywords: dict[str, Any] = {"attention_mask": (1.0 - mask[:, None, None, :]) * MASKED}
        if token_type_ids is not None:
            keywords["token_type_ids"] = token_type_ids
        if self.padding_id is not None:
            keywords["position_ids"] = _positions_after(self.padding_id, input_ids)
        found = self.model(input_ids=input_ids, **keywords)
        if self.pooling is not None:
            return (pool(found.last_hidden_state, mask, self.pooling),)
        return tuple(found[name] for name in self.outputs)


def _positions_after(padding_id: int, ids: Tensor) -> Tensor:
    """Count real tokens from `padding_id` + 1, as fairseq does; padding stays at `padding_id`."""
    real = (ids != padding_id).to(torch.int64)
    return torch.cumsum(real, dim=1) * real + padding_id


def pool(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """Pool as sentence-transformers does, with its limits against division by zero."""
    if pooling.mode == "cls":
        pooled = hidden[:, 0]
    else:
        weights = mask[:, :, None]
        pooled = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
    if not pooling.normalize:
        return pooled
    return pooled / pooled.norm(dim=1, keepdim=True).clamp(min=1e-12)


def _simplify(model: nn.Module, checkpoint: Checkpoint, has_types: bool) -> None:
    """Replace, in place, modules whose export would hide what they compute."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (activations.NewGELUActivation, activations.GELUTanh)):
                setattr(parent, name, nn.GELU(approximate="tanh"))
            elif isinstance(child, activations.GELUActivation):
                setattr(parent, name, nn.GELU())
    base = model.base_model
    if checkpoint.head == "embedding" and hasattr(base, "pooler"):
        base.pooler = None
    if hasattr(base.embeddings, "token_type_embeddings") and not has_types:
        _fold_token_type(base.embeddings)
    if checkpoint.family == "mpnet":
        bias = _RelativeBias(base.encoder, base.config)
        base.encoder.add_module("relative_bias", bias)
        # Beside the class's method, not through nn.Module, which would keep the method first.
        base.encoder.__dict__["compute_position_bias"] = bias.forward


def _fold_token_type(embeddings: nn.Module) -> None:
    """Add the only token type's row to every position, so that its lookup disappears."""
    table = embeddings.position_embeddings
    row = embeddings.token_type_embeddings.weight[0]
    folded = nn.Embedding.from_pretrained(table.weight.detach() + row.detach())
    embeddings.position_embeddings = folded
    embeddings.token_type_embeddings = _Zero()


class _Zero(nn.Module):
    def forward(self, ids: Tensor) -> float:
        return 0.0


class _RelativeBias(nn.Module):
    """MPNet's bias by distance as one small table: row `key - query + last` holds every head.

    transformers computes the buckets with logarithms for each pair of positions instead.
    """

    def __init__(self, encoder: nn.Module, config: Any):
        super().__init__()
        self.last = config.max_position_embeddings - 1
        distances = torch.arange(-self.last, self.last + 1)
        buckets = config.relative_attention_num_buckets
        rows = encoder.relative_position_bucket(distances, num_buckets=buckets)
        self.table = nn.Parameter(encoder.relative_attention_bias.weight[rows].detach())
        self.register_buffer("positions", torch.arange(self.last + 1)[None])

    def forward(self, hidden: Tensor) -> Tensor:
        # A slice, not a Range: the importer gives a Range an axis of its own.
        across = self.positions[:, : hidden.shape[1]]
        rows = across - across.transpose(0, 1) + self.last
        return nn.functional.embedding(rows, self.table).permute(2, 0, 1)[None]
