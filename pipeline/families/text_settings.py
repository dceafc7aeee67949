"""Reads what a model's directory says of its texts: their case, a prompt, their longest.

The files are transformers' tokenizer_config.json and two of sentence-transformers, which come along
into a bundle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bertile.base.errors import ModelError
from bertile.families.model_config import read_object

PROMPTS = "config_sentence_transformers.json"
# Names of old versions of sentence-transformers, in the order in which it looks for them.
SENTENCES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
FILES = (*SENTENCES, PROMPTS)
# transformers' classes that take a tokenizer.json as it is; others set its normalizer anew.
_AS_IT_IS = {"TokenizersBackend", "PreTrainedTokenizer", "PreTrainedTokenizerFast"}


@dataclass(frozen=True)
class TextSettings:
    """How the texts of one model become ids.

    prompt       what is put in front of each
    lower        whether they are lowercased first, whatever the tokenizer does
    normalizer   what BERT's normalizer is set to, by its attributes; None leaves it as it is
    longest      tokens to which sentence-transformers cuts a text; None where it is not asked
    cut_at       tokens to which a text is cut where the user wants that; None for no other limit
    side         "left" or "right", where a text is cut; None for what its tokenizer.json says
    """

    prompt: str = ""
    lower: bool = False
    normalizer: Mapping[str, bool | None] | None = None
    longest: int | None = None
    cut_at: int | None = None
    side: str | None = None


def read(directory: Path) -> TextSettings:
    """What the files in `directory` say; ModelError, naming the file, for what makes no sense."""
    sentences: dict[str, Any] | None = None
    for name in SENTENCES:
        if (directory / name).exists():
            sentences = read_object(directory / name)
            break
    tokens: dict[str, Any] = {}
    path = directory / "tokenizer_config.json"
    if path.exists():
        tokens = read_object(path)
    side = tokens.get("truncation_side")
    of_sentences = sentences is not None
    sentences = sentences or {}
    longest = _length(sentences.get("max_seq_length"))
    if of_sentences and longest is None:  # as sentence-transformers does, which saves no other now
        longest = _length(tokens.get("model_max_length"))
    return TextSettings(
        prompt=default_prompt(directory),
        lower=bool(sentences.get("do_lower_case")),
        normalizer=_normalizer(tokens) if path.exists() else None,
        longest=longest,
        cut_at=longest or _length(tokens.get("model_max_length")),
        side=side if side in ("left", "right") else None,
    )


def default_prompt(directory: Path) -> str:
    """What sentence-transformers puts in front of a text where nothing else is asked for."""
    path = directory / PROMPTS
    config = read_object(path) if path.exists() else {}
    name, prompts = config.get("default_prompt_name"), config.get("prompts") or {}
    if name is None:
        return ""
    prompt = prompts.get(name) if isinstance(prompts, dict) and isinstance(name, str) else None
    if not isinstance(prompt, str):
        raise ModelError(f"'{path}' has no prompt of the name {name!r}, its default")
    return prompt


def _length(value: Any) -> int | None:
    # "no limit" is a number of thirty digits, and some files have it as a float
    return int(value) if isinstance(value, (int, float)) and 0 < value < 1 << 24 else None


def _normalizer(config: Mapping[str, Any]) -> Mapping[str, bool | None] | None:
    if config.get("tokenizer_class") in _AS_IT_IS:
        return None
    accents = config.get("strip_accents")  # None: as lowercase
    return {
        "lowercase": bool(config.get("do_lower_case", True)),
        "strip_accents": accents if isinstance(accents, bool) else None,
        "handle_chinese_chars": bool(config.get("tokenize_chinese_chars", True)),
    }
