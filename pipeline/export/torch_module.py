"""Wraps a transformers model into a torch module with plain inputs, outputs and masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import activations

from bertile.export.checkpoints import Checkpoint
from bertile.export.files import Pooling
from bertile.families import embeddings, table
from bertile.onnx.masks import MASKED

# By their names in a config: classes are renamed between releases of transformers.
_BY_TANH = tuple(type(activations.ACT2FN[name]) for name in ("gelu_new", "gelu_pytorch_tanh"))


class Exportable(nn.Module):
    """The forward that is exported: (batch, length) integers in, float32 tensors out.

    transformers would build the attention mask with data-dependent code that the ONNX importer
    cannot follow, so the mask is built here, in the 4-D additive form that eager attention takes
    as it is in every family. Where `additive` is off, the model is left to build it of (batch,
    length), which releases before 5 do in plain arithmetic, and some families of 5.0.
    `notes` say what preparing the model has settled.
    """

    def __init__(self, checkpoint: Checkpoint, inputs: tuple[str, ...], outputs: tuple[str, ...]):
        super().__init__()
        self.model = checkpoint.model
        self.pooling = checkpoint.pooling
        self.inputs = inputs
        self.outputs = outputs
        self.additive = True
        self.padding_id = table.named(checkpoint.family).padding_id(self.model)
        self.notes = _simplify(self.model, checkpoint, "token_type_ids" in inputs)
        self.eval()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        mask = attention_mask.to(torch.float32)
        keywords: dict[str, Any] = {"attention_mask": attention_mask}
        if self.additive:
            keywords["attention_mask"] = (1.0 - mask[:, None, None, :]) * MASKED
        if token_type_ids is not None:
            keywords["token_type_ids"] = token_type_ids
        if self.padding_id is not None:
            keywords["position_ids"] = _positions_after(self.padding_id, input_ids)
        results = self.model(input_ids=input_ids, **keywords)
        if self.pooling is not None:
            return (pool(results.last_hidden_state, mask, self.pooling),)
        return tuple(results[name] for name in self.outputs)


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


def _simplify(model: nn.Module, checkpoint: Checkpoint, has_types: bool) -> tuple[str, ...]:
    """Replace, in place, modules whose export would hide what they compute; return notes."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _BY_TANH):
                setattr(parent, name, nn.GELU(approximate="tanh"))
            elif isinstance(child, activations.GELUActivation):
                setattr(parent, name, nn.GELU())
    family, base = table.named(checkpoint.family), model.base_model
    if checkpoint.head == "embedding" and hasattr(base, "pooler"):
        base.pooler = None
    if family.token_types and not has_types:
        embeddings.fold_token_type(base.embeddings)
    return family.prepare(model) if family.prepare else ()
