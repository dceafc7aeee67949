"""Wraps a transformers model into a torch module with plain inputs, outputs and masks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import activations

from bertile.base.errors import ModelError
from bertile.export import pretrained
from bertile.export.checkpoints import Checkpoint
from bertile.export.sentence_modules import (
    BESIDE,
    Chain,
    Dense,
    LayerNorm,
    Normalize,
    Pool,
    Score,
    Splade,
    Words,
)
from bertile.families import embeddings, table, text_settings
from bertile.families.family import has_places
from bertile.loader import BOXES, SIDES
from bertile.onnx.exported import EXITS
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
        self.embedding = checkpoint.chain and Embedding(checkpoint.chain)
        files = checkpoint.chain.beside if checkpoint.chain else ()
        self.beside = nn.ModuleList(map(_OfTokens, files))
        self.inputs = inputs
        self.outputs = outputs
        self.exits = checkpoint.exits
        names = {name.partition(".")[0] for name in outputs if "." in name} - {EXITS}
        names |= set() if self.exits is None else {"hidden_states"}
        self.layers = {f"output_{name}": True for name in sorted(names)}
        self.additive = True
        self.padding_id = table.named(checkpoint.family).padding_id(self.model)
        self.notes = _simplify(self.model, checkpoint, "token_type_ids" in inputs)
        self.eval()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        bbox_left: Tensor | None = None,
        bbox_top: Tensor | None = None,
        bbox_right: Tensor | None = None,
        bbox_bottom: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        boxes = dict(zip(SIDES, (bbox_left, bbox_top, bbox_right, bbox_bottom)))
        keywords: dict[str, Any] = {} if bbox_left is None else with_boxes(boxes)
        mask = torch.ones_like(input_ids, dtype=torch.float32)
        if attention_mask is not None:
            mask = attention_mask.to(torch.float32)
            keywords["attention_mask"] = attention_mask
        if self.additive:
            keywords["attention_mask"] = (1.0 - mask[:, None, None, :]) * MASKED
        if token_type_ids is not None:
            keywords["token_type_ids"] = token_type_ids
        if self.padding_id is not None:
            keywords["position_ids"] = _positions_after(self.padding_id, input_ids)
        results = self.model(input_ids=input_ids, **keywords, **self.layers)
        if self.embedding is not None:
            beside = (head(results.last_hidden_state, mask) for head in self.beside)
            return (self.embedding(results, mask), *beside)
        answers = flat(results)
        for head in self.exits or ():
            inputs = {"input_ids": input_ids, **keywords}
            answers[f"{EXITS}.{head.layers}"] = head(results["hidden_states"], inputs)
        return tuple(answers[name] for name in self.outputs)


def flat(results: Any) -> dict[str, Tensor]:
    """A model's answers by name, those of several layers as hidden_states.0, hidden_states.1, …"""
    tensors: dict[str, Tensor] = {}
    for name, value in results.items():
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, (tuple, list)):
            parts = {f"{name}.{place}": part for place, part in enumerate(value)}
            tensors |= {key: part for key, part in parts.items() if isinstance(part, Tensor)}
    return tensors


def with_boxes(arguments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a model is called with, of arguments by our names: its boxes as one of four channels.

    None of them ends before it begins: its size, which models look up, is never below 0.
    """
    if SIDES[0] not in arguments:
        return dict(arguments)
    left, top, right, bottom = (arguments[side] for side in SIDES)
    right, bottom = (torch.where(b > a, b, a) for a, b in ((left, right), (top, bottom)))
    boxes = torch.stack([left, top, right, bottom], -1)
    return {**{n: v for n, v in arguments.items() if n not in SIDES}, BOXES: boxes}


def _simplify_gelu(module: nn.Module) -> None:
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _BY_TANH):
                setattr(parent, name, nn.GELU(approximate="tanh"))
            elif isinstance(child, activations.GELUActivation):
                setattr(parent, name, nn.GELU())


def _positions_after(padding_id: int, ids: Tensor) -> Tensor:
    """Count real tokens from `padding_id` + 1, as fairseq does; padding stays at `padding_id`."""
    real = (ids != padding_id).to(torch.int64)
    return torch.cumsum(real, dim=1) * real + padding_id


class Embedding(nn.Module):
    """What sentence-transformers' modules make of a transformer's outputs, in float32.

    Comes in: the outputs and the mask (batch, length), 1.0 at real tokens. Goes out: (batch,
    width), or (batch, length, width) of a chain without a pooling.
    """

    def __init__(self, chain: Chain):
        super().__init__()
        of_logits = chain.kind == "sparse" or chain.words
        self.reads = "logits" if of_logits else "last_hidden_state"
        self.steps = nn.ModuleList(map(_step, chain.steps))

    def forward(self, results: Any, mask: Tensor) -> Tensor:
        vectors = results[self.reads].float()
        for step in self.steps:
            vectors = step(vectors, mask) if isinstance(step, _Pooling) else step(vectors)
        return vectors


class _Pooling(nn.Module):
    def __init__(self, step: Pool | Splade):
        super().__init__()
        self.step = step

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        if isinstance(self.step, Splade):
            return weigh(hidden, mask, self.step)
        return torch.cat([pool(hidden, mask, mode) for mode in self.step.modes], dim=-1)


class _Normalize(nn.Module):
    def forward(self, vectors: Tensor) -> Tensor:
        return vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=1e-12)


class _OfTokens(nn.Module):
    """What a linear layer in a file of its own makes of vectors of tokens, as BGE-M3 does: a weight
    above zero each, (batch, length), or a vector of unit length each.
    """

    def __init__(self, path: Path):
        super().__init__()
        weights = {f"linear.{name}": value for name, value in pretrained.tensors(path).items()}
        self.linear = _linear(weights, "linear", path)
        self.weighs = BESIDE[path.name] == text_settings.WEIGHTS
        if self.weighs and self.linear.out_features != 1:
            raise ModelError(
                f"'{path}' gives each token {self.linear.out_features} weights, not one"
            )

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        vectors = self.linear(hidden.float())
        if self.weighs:
            return torch.relu(vectors).squeeze(-1) * mask
        return nn.functional.normalize(vectors * mask[:, :, None], dim=-1)


class _Score(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        """(batch, 1 or 2) to (batch, 1)."""
        yes, no = logits[:, :1], logits[:, 1:]
        return yes - no if no.shape[1] else yes


class _Dense(nn.Module):
    def __init__(self, step: Dense):
        super().__init__()
        weights = pretrained.tensors(step.directory)
        self.linear = _linear(weights, "linear", step.directory)
        self.activation = getattr(nn, step.activation)()
        self.residual = None
        if step.residual:
            square = self.linear.in_features == self.linear.out_features
            self.residual = (
                nn.Identity() if square else _linear(weights, "residual", step.directory)
            )

    def forward(self, vectors: Tensor) -> Tensor:
        result = self.activation(self.linear(vectors))
        return result if self.residual is None else result + self.residual(vectors)


def _step(step: Any) -> nn.Module:
    if isinstance(step, Dense):
        return _Dense(step)
    if isinstance(step, LayerNorm):
        weights = pretrained.tensors(step.directory)
        weight = pretrained.tensor(weights, "norm.weight", 1, step.directory)
        norm = nn.LayerNorm(len(weight))
        bias = pretrained.tensor(weights, "norm.bias", 1, step.directory)
        norm.load_state_dict({"weight": weight, "bias": bias})
        return norm
    if isinstance(step, Score):
        return _Score()
    if isinstance(step, Words):
        return nn.Identity()  # no other rows of the head are there
    return _Normalize() if isinstance(step, Normalize) else _Pooling(step)


def _linear(weights: Mapping[str, Tensor], name: str, directory: Path) -> nn.Linear:
    weight = pretrained.tensor(weights, f"{name}.weight", 2, directory)
    held = {"weight": weight}
    if f"{name}.bias" in weights:
        held["bias"] = pretrained.tensor(weights, f"{name}.bias", 1, directory)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in held)
    linear.load_state_dict(held)
    return linear


def pool(hidden: Tensor, mask: Tensor, mode: str) -> Tensor:
    """Pool as sentence-transformers does, with its limits against division by zero."""
    if mode == "cls":
        return hidden[:, 0]
    if mode == "max":
        return hidden.masked_fill(mask[:, :, None] == 0, float("-inf")).amax(1)
    weights, real = mask, (mask > 0).to(torch.int64)
    if mode == "weightedmean":  # by places, counted from the first real token
        weights = mask * torch.cumsum((torch.cumsum(real, 1) > 0).to(real.dtype), 1)
    elif mode == "lasttoken":
        weights = mask * (torch.cumsum(real, 1) == real.sum(1, keepdim=True)).to(mask.dtype)
    weighted = (hidden * weights[:, :, None]).sum(1)
    if mode == "lasttoken":
        return weighted
    count = weights.sum(1, keepdim=True).clamp(min=1e-9)
    return weighted / (count.sqrt() if mode == "mean_sqrt_len_tokens" else count)


def weigh(logits: Tensor, mask: Tensor, step: Splade) -> Tensor:
    """Weights of the vocabulary's ids, log(1 + relu(logits)) over real tokens, as SpladePooling."""
    logits = logits * mask[:, :, None]
    # The largest first, since the logarithm keeps their order: it is taken once an id then.
    weights = torch.relu(logits.amax(1) if step.strategy == "max" else logits)
    for _ in range(2 if step.twice else 1):
        weights = torch.log1p(weights)
    return weights if step.strategy == "max" else weights.sum(1)


def _simplify(model: nn.Module, checkpoint: Checkpoint, has_types: bool) -> tuple[str, ...]:
    """Replace, in place, modules whose export would hide what they compute; return notes."""
    for module in (model, *(checkpoint.exits or ())):
        _simplify_gelu(module)
    family, base = table.named(checkpoint.family), model.base_model
    if checkpoint.head == "embedding" and hasattr(base, "pooler"):
        base.pooler = None
    # without a table of positions there is nothing to fold it into: it stays a lookup
    if family.type_count(model) and not has_types and has_places(model):
        embeddings.fold_token_type(base.embeddings)
    return family.prepare(model) if family.prepare else ()
