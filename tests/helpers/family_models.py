"""Saves, exports and answers for the tiny model of each family; what an untouched one computes."""

from __future__ import annotations

import json
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest

from bertile.base.cache import Cache
from bertile.base.quiet import quiet
from bertile.config import HEADS, Config
from bertile.export import cached, checkpoints
from bertile.families.decoders import DECODERS
from bertile.families.family import CAUSAL, Family
from bertile.families.rarer import RARER
from bertile.families.table import FAMILIES, of_type
from bertile.onnx.exported import ExportedModel

# Those of encoders with a row of their own; decoders are alike, and have families/test_decoders,
# rarer encoders families/test_other_encoders.
APART = (*RARER, *DECODERS)
NAMES = tuple(family.name for family in FAMILIES if family not in APART)
OTHERS = NAMES[1:]  # beside BERT, with which every test is made anyway
EVERY = [*NAMES, *(pytest.param(family.name, marks=pytest.mark.slow) for family in APART)]
# Every head that transformers has for each family.
PAIRS = tuple((family.name, head) for family in FAMILIES for head in family.heads)
# The head that quick tests give each family's model: every head is there, and every export is made
# once for all files. A head of its own class comes before the turn.
_ENCODERS = cycle(head for head in HEADS if head != CAUSAL)
_DECODERS = cycle((CAUSAL, "embedding", "sequence-classification", "encoder"))
_TURNS = [next(_DECODERS if family.causal else _ENCODERS) for family in FAMILIES]
HEAD_OF = {
    family.name: next(iter(family.auto_classes), head if head in family.heads else "encoder")
    for family, head in zip(FAMILIES, _TURNS)
}


def has_types(family: Family) -> bool:
    """Whether token types are an input of its tiny model."""
    return family.token_types and family.tiny.get("type_vocab_size", 2) > 1


def untouched(name: str, head: str = "encoder"):
    """The synthetic model as transformers builds it, with fused attention where it has that."""
    model = checkpoints.load(f"synthetic:{name}", head).model
    if model._supports_sdpa:
        with quiet():
            model.set_attn_implementation("sdpa")
    return model


def directory(name: str, head: str, cache: str) -> Path:
    """What save_pretrained writes of a synthetic model."""

    def save(path: Path) -> None:
        with quiet():
            checkpoints.load(f"synthetic:{name}", head).model.save_pretrained(path)

    return Cache(cache).get_or_make(f"saved-{name}-{head}", save)[0]


def exported(name: str, head: str, cache: str) -> ExportedModel:
    """That directory's export."""
    path = directory(name, head, cache)
    return cached.export_cached(str(path), Config(head=head, cache_dir=cache))


def padding_id(model: ExportedModel) -> int:
    """What its tokenizer would pad with."""
    config = json.loads((model.directory / "config.json").read_text(encoding="utf-8"))
    return config["pad_token_id"] or 0


def torch_outputs(model, head: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run an untouched model with the 2-D mask, as a user would; pooled by mean for `embedding`, by
    the last token where tokens see those before them alone.
    """
    import torch

    from bertile.export.torch_module import with_boxes

    tensors = {key: torch.from_numpy(value) for key, value in arrays.items()}
    with torch.no_grad():
        outputs = model(**with_boxes(tensors))
    if head == "embedding":
        mask = torch.from_numpy(arrays["attention_mask"])
        if not of_type(model.config.model_type).sees_all(model.config):
            mask = mask * (mask.cumsum(1) == mask.sum(1, keepdim=True))
        weights = mask[:, :, None].float()
        mean = (outputs.last_hidden_state * weights).sum(1) / weights.sum(1)
        return {"sentence_embedding": torch.nn.functional.normalize(mean, dim=1).numpy()}
    return {key: value.numpy() for key, value in outputs.items() if hasattr(value, "numpy")}
