"""Sets a model's tokenizer.json so that it gives the ids of the model's own library by itself.

It neither pads nor cuts, and lowercases and normalizes as transformers and sentence-transformers
do. A tokenizer in another form is converted by transformers.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bertile.base import extras
from bertile.base.errors import BertileError, ModelError, require
from bertile.base.quiet import quiet
from bertile.families.text_settings import TextSettings

NAME = "tokenizer.json"
SENTENCEPIECE = ("spiece.model", "sentencepiece.model", "sentencepiece.bpe.model")
# Vocabularies of which transformers makes a tokenizer.json, and what must lie beside each.
VOCABULARIES = {"vocab.txt": "", "vocab.json": "merges.txt", **dict.fromkeys(SENTENCEPIECE, "")}
_CONVERTER = ("transformers", "tokenizers")


def prepare(directory: Path, settings: TextSettings, source: str) -> TextSettings:
    """Write `directory`/tokenizer.json anew, of itself or of a vocabulary that lies there.

    Gives the settings with what the file alone has said: the side where it cuts. Raises ModelError,
    which names the `source`, for a tokenizer that cannot be read or converted, MissingExtraError
    without the packages that convert it. Where no tokenizer lies, nothing is written.
    """
    path = directory / NAME
    if not path.is_file() and not _convert(directory, source):
        return settings
    content = _read(path, source)
    direction = str((content.get("truncation") or {}).get("direction", "")).lower()
    content["truncation"] = content["padding"] = None
    content["normalizer"] = normalizer(content.get("normalizer"), settings)
    path.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
    _must_be_readable(path, source)
    side = direction if direction in ("left", "right") else None
    return dataclasses.replace(settings, side=settings.side or side)


def check(directory: Path) -> None:
    """Refuse, before anything is loaded, a vocabulary that cannot be converted here.

    Raises ModelError for half of one, MissingExtraError without the packages that convert it.
    """
    if (directory / NAME).is_file() or (vocabulary := _vocabulary(directory)) is None:
        return
    beside = VOCABULARIES[vocabulary]
    if beside and not (directory / beside).is_file():
        raise _unsupported(str(directory), vocabulary, f"there is no {beside} beside it")
    reader = ("sentencepiece",) if vocabulary in SENTENCEPIECE else ()
    extras.must_be_there(*_CONVERTER, *reader)


def normalizer(
    content: Mapping[str, Any] | None, settings: TextSettings
) -> Mapping[str, Any] | None:
    """What a tokenizer.json says of its normalizer, set as the settings say."""
    if settings.normalizer is not None and content and content.get("type") == "BertNormalizer":
        content = {**content, **settings.normalizer}
    if not settings.lower:
        return content
    lower = {"type": "Lowercase"}
    inner = [content] if content else []
    if content and content.get("type") == "Sequence":
        inner = list(content.get("normalizers") or ())
    if lower in inner:
        return content
    return {"type": "Sequence", "normalizers": [lower, *inner]} if inner else lower


def _vocabulary(directory: Path) -> str | None:
    return next((name for name in VOCABULARIES if (directory / name).is_file()), None)


def _read(path: Path, source: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(source, error) from error
    if not isinstance(content, dict):
        raise _unreadable(source, f"it is no JSON object, but of type {type(content).__name__}")
    return content


def _unreadable(source: str, reason: object) -> ModelError:
    return ModelError(f"the {NAME} of '{source}' cannot be read: {reason}", "save it again")


def _must_be_readable(path: Path, source: str) -> None:
    """Refuse a file that whoever runs texts could not read; unseen without the package for it."""
    try:
        tokenizers = importlib.import_module("tokenizers")
    except ImportError:
        return
    try:
        tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exception for a file it cannot read
        raise _unreadable(source, error) from error


def _convert(directory: Path, source: str) -> bool:
    """Write tokenizer.json of another form; False where there is none."""
    vocabulary = _vocabulary(directory)
    if vocabulary is None:
        return False
    check(directory)
    (transformers,) = require("export", "transformers")
    try:
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
    except BertileError:
        raise
    except Exception as error:  # each class checks in its own way, and wants packages of its own
        lines = str(error).strip().splitlines()
        raise _unsupported(source, vocabulary, lines[0] if lines else repr(error)) from error
    if not tokenizer.is_fast:
        what = f"transformers has no fast {type(tokenizer).__name__}"
        raise _unsupported(source, vocabulary, what)
    tokenizer.backend_tokenizer.save(str(directory / NAME))
    return True


def _unsupported(source: str, vocabulary: str, reason: str) -> ModelError:
    return ModelError(
        f"the tokenizer of '{source}' ({vocabulary}) cannot become a {NAME}: {reason}",
        f"put a {NAME} beside it, or take {vocabulary} away: the bundle then takes ids alone",
    )
