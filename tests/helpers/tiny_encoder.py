"""Compiles the two-layer model with an embedding head, and gives it words to be asked with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_bundle import change_manifest

import bertile
from bertile.config import Config
from bertile.loading.files import sha256

MODEL = "synthetic:bert-tiny:embedding"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "movie"]


def compile(output: Path, stages: str, **choices: Any) -> Path:
    """A real bundle with a tokenizer of seven words."""
    bertile.compile(MODEL, output, Config(cache_dir=stages, **choices))
    path = tokenizer(output / "tokenizer.json")
    change_manifest(output, lambda m: m["files"].update(described(path)))
    return output


def save(directory: Path) -> Path:
    """The model as a Hugging Face directory, with the same tokenizer."""
    from bertile.export import checkpoints

    checkpoints.load(MODEL).model.save_pretrained(directory)
    tokenizer(directory / "tokenizer.json")
    return directory


def described(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {path.name: {"sha256": sha256(path), "bytes": path.stat().st_size}}


def tokenizer(path: Path) -> Path:
    """Write a tokenizer.json of these words, and return its path."""
    tokenizers = pytest.importorskip("tokenizers", reason="texts need a tokenizer")
    words = {word: number for number, word in enumerate(WORDS)}
    word_level = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    word_level.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    word_level.save(str(path))
    return path
