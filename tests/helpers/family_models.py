"""Saves, exports and answers for the tiny model of each family; what an untouched one computes."""

from __future__ import annotations

import json
from itertools import cycle
from pathlib import Path

import numpy as np

from bertile.base.cache import Cache
from bertile.base.quiet import quiet
from bertile.config import HEADS, Config
from bertile.export import cached, checkpoints
from bertile.families.family import Family
from bertile.families.table import FAMILIES
from bertile.onnx.exported import ExportedModel

NAMES = tuple(family.name for family in FAMILIES)
OTHERS = NAMES[1:]  # beside BERT, with which every test is made anyway
# Every head that transformers has for each family.
PAIRS = tuple((family.name, head) for family in FAMILIES for head in family.heads)
# The head that quick tests give each family's model: every head is there, and every export is made
# once for all files. A head of its own class comes before the turn.
HEAD_OF = {
    family.name: next(iter(family.auto_classes), head if head in family.heads else HEADS[0])
    for family, head in zip(FAMILIES, cycle(HEADS))
}


def has_types(family: Family) -> bool:
    """Whether token types are an input of its tiny model."""
    return family.token_types and family.tiny.get("type_vocab_size", 2) > 1


def untouched(name: str, head: str = "encoder"):
    """The synthetic model as transformers builds it, with fused attention where it has that."""
    model = checkpoints.load(f"synthetic:{name}", head).model
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
    """Run an untouched model with the 2-D mask, as a user would; pooled by mean for `embedding`."""
    import torch

    with torch.no_grad():
        outputs = model(**{key: torch.from_numpy(value) for key, value in arrays.items()})
    if head == "embedding":
        weights = torch.from_numpy(arrays["attention_mask"])[:, :, None].float()
        mean = (outputs.last_hidden_state * weights).sum(1) / weights.sum(1)
        return {"sentence_embedding": torch.nn.functional.normalize(mean, dim=1).numpy()}
    return {key: value.numpy() for key, value in outputs.items()}
