"""Saves tiny models of sentence-transformers' forms, with a tokenizer, seeded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bertile.base.quiet import quiet
from bertile.export import checkpoints

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = (
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "a", "mat", "."),
    *("é", "日", "本", "good", "bad", "movie", "query", ":", "!"),
    *LETTERS,
    *(f"##{letter}" for letter in LETTERS),
)
TEXTS = (
    "The cat sat on the mat.",
    "a",
    "",
    "Query: a BAD movie, a bad bad movie! the end of a movie that was bad",
    "É 日本 😀 mat",
)
WIDTH = 128  # of a token's vector


def transformer(directory: Path, head: str = "encoder", model_type: str = "bert") -> Path:
    """The two-layer model as transformers saves it, with a tokenizer that pads and cuts."""
    tokenizers = pytest.importorskip("tokenizers", reason="texts need a tokenizer")
    with quiet():
        checkpoints.load(f"synthetic:{model_type}-tiny", head).model.save_pretrained(directory)
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = tokenizers.BertWordPieceTokenizer(vocabulary, lowercase=True)
    tokenizer.enable_padding(length=24)
    tokenizer.enable_truncation(24)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    settle(
        directory / "tokenizer_config.json",
        tokenizer_class="BertTokenizer",
        model_max_length=512,
        **{f"{n}_token": f"[{n.upper()}]" for n in ("pad", "unk", "cls", "sep", "mask")},
    )
    return directory


def settle(path: Path, **values: Any) -> None:
    """Write a file of settings."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values), encoding="utf-8")


def seeded(model: Any) -> Any:
    """The model, all parameters of its modules behind the transformer drawn anew."""
    import torch

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        for module in list(model)[1:]:
            for parameter in module.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def saved(directory: Path, model: Any) -> Path:
    """What a model of sentence-transformers writes of itself."""
    with quiet():
        seeded(model).save(str(directory), create_model_card=False)
    return directory
