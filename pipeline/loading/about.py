"""Tells what a loaded model is: its head's labels, its tokenizer, and itself in one line."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bertile.loading.errors import BertileError, BundleError, PlatformError
from bertile.loading.ragged import MASK

TOKENIZER = "tokenizer.json"


def padding_id(manifest: dict[str, Any]) -> int | None:
    """What a tokenizer fills the rows of a batch with; None where there is no tokenizer, or no
    mask to say so.
    """
    masked = any(spec["name"] == MASK for spec in manifest["inputs"])
    text = manifest.get("text") or {}
    return text.get("padding_id") if masked and TOKENIZER in manifest["files"] else None


class Bundled:
    """What a loaded model of any kind of machine says of itself.

    `manifest` is what the bundle's manifest.json holds; `inputs` and `outputs` are the names of
    arrays; `max_length` is the most tokens that a sequence may have, None for no limit.
    """

    manifest: dict[str, Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    max_length: int | None
    loaded_by: Callable[[], Any] | None  # what loads the same once more
    _read_tokenizer: Any = None

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        raise NotImplementedError

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of a classifier's classes, in the order of its logits; () of other heads."""
        return tuple(self.manifest["model"].get("labels") or ())

    @property
    def directory(self) -> Path:
        """The bundle's directory; raises BertileError for a model that `load` did not make."""
        if self.loaded_by is None:
            raise BertileError("the model was not loaded from a directory", "load it with load()")
        return Path(self.loaded_by.args[0])

    @property
    def tokenizer(self) -> Any:
        """The bundle's `tokenizers.Tokenizer`, which pads batches and cuts texts to the tokens that
        the model's own library takes, at most `max_length`.

        It normalizes texts as that library does. Prompts are not in it; `bertile run` follows them.
        Raises BundleError where the bundle has none, PlatformError without the package tokenizers.
        """
        if self._read_tokenizer is None:
            text = self.manifest.get("text") or {}  # bundles of older versions have none
            limits = (self.max_length, text.get("cut_at"))
            limit = min((limit for limit in limits if limit), default=None)
            self._read_tokenizer = _tokenizer(self.directory, limit, text)
        return self._read_tokenizer

    def _place(self) -> str:
        raise NotImplementedError

    def __repr__(self) -> str:
        model, target = self.manifest["model"], self.manifest["target"]
        precision = self.manifest.get("config", {}).get("precision", "fp32")
        limit = f", at most {self.max_length} tokens" if self.max_length else ""
        return (
            f"<bertile.Model {model.get('source')} ({model.get('family')}, {model.get('head')}):"
            f" {precision} for {target.get('name')}, {', '.join(self.inputs)} ->"
            f" {', '.join(self.outputs)}{limit}, {'closed' if self.closed else self._place()}>"
        )


def _tokenizer(directory: Path, limit: int | None, text: dict[str, Any]) -> Any:
    path = directory / TOKENIZER
    if not path.is_file():
        raise BundleError(f"{directory} has no {TOKENIZER}", "call the model with token ids")
    try:
        tokenizers = importlib.import_module("tokenizers")  # nothing else here needs it
    except ImportError as error:
        raise PlatformError(
            "the package tokenizers is missing", "install it with: pip install tokenizers"
        ) from error
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exception for a file it cannot read
        raise BundleError(f"{path} cannot be read: {error}") from error
    padding = tokenizer.padding or {}
    kept = {name: padding[name] for name in ("pad_id", "pad_token", "direction") if name in padding}
    pad_id = text.get("padding_id")
    token = None if pad_id is None else tokenizer.id_to_token(pad_id)
    if token is not None:
        kept = {"pad_id": pad_id, "pad_token": token}
    tokenizer.no_padding()
    tokenizer.enable_padding(**kept)  # to the longest of a batch, whatever the file says
    tokenizer.no_truncation()
    if limit:
        tokenizer.enable_truncation(limit, direction=text.get("side") or "right")
    return tokenizer
