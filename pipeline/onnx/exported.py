"""Describes what the export stage hands on: a directory with model.onnx and export.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bertile.base.directories import mark
from bertile.base.errors import BertileError, ModelError
from bertile.families import text_settings
from bertile.families.text_settings import TextSettings
from bertile.loader import NEUTRAL, SIDES

# The inputs that a model may have, in their order, and what fills each where a caller leaves it
# out.
DEFAULTS = {"input_ids": None, **NEUTRAL, **dict.fromkeys(SIDES, "zeros")}


MARKER = "export.json"
EXITS = "exits"  # an early head's output is called exits.2: it is behind two encoder layers
UNKNOWN = "unknown"  # the family of an ONNX file that nothing beside it tells, and its head


@dataclass(frozen=True)
class InputSpec:
    """One integer input of shape (batch, length); ids are at least 0 and less than `below`.

    `default` says what fills an input that the caller leaves out, as in DEFAULTS; None: nothing.
    """

    name: str
    dtype: str = "int64"
    below: int | None = None
    default: str | None = None


@dataclass(frozen=True)
class ExportedModel:
    """A canonical ONNX model on disk; `batch` and `length` are set where that axis is static.

    `together` says that outputs depend on other rows of the batch, which is computed at once then.
    `padded` says that they depend on what stands at masked positions, which are computed then.
    `exits` are the encoder layers behind which there are logits, the last those of the whole model;
    () of a model without early heads. `max_length` counts the tokens that a sequence may have,
    which for RoBERTa is less than the rows of its position table. `notes` are for people: what was
    found, changed or measured. `text` says how texts become ids and answers; `tokenizer.json` is
    set by it.
    """

    directory: Path
    source: str
    sha256: str
    family: str
    head: str
    max_length: int | None
    inputs: tuple[InputSpec, ...]
    outputs: tuple[str, ...]
    labels: tuple[str, ...] = ()
    exits: tuple[int, ...] = ()
    batch: int | None = None
    length: int | None = None
    together: bool = False
    padded: bool = False
    notes: tuple[str, ...] = ()
    text: TextSettings = field(default_factory=TextSettings)

    @property
    def early_outputs(self) -> tuple[str, ...]:
        """The names of the outputs of early heads, one for each of `exits` but the last."""
        return tuple(f"{EXITS}.{layers}" for layers in self.exits[:-1])

    @property
    def onnx_path(self) -> Path:
        return self.directory / "model.onnx"

    def files(self) -> list[Path]:
        """What goes into a bundle as it is: the tokenizer's files and config.json."""
        ours = ("model.onnx", MARKER)
        files = sorted(path for path in self.directory.iterdir() if path.is_file())
        return [path for path in files if not path.name.startswith(ours)]

    def to_json(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        del fields["directory"]
        return fields

    @classmethod
    def from_json(cls, directory: Path, fields: Mapping[str, Any]) -> ExportedModel:
        values = {k: v for k, v in fields.items() if k not in ("bertile", "schema", "files")}
        values["inputs"] = tuple(InputSpec(**spec) for spec in values["inputs"])
        for name in ("outputs", "labels", "notes"):
            values[name] = tuple(values[name])
        values["exits"] = tuple(values.get("exits", ()))  # an older version's export has none
        if "text" in values:
            values["text"] = TextSettings.from_json(values["text"])
        else:  # an older version's export, whose files say it
            values["text"] = text_settings.read(Path(directory), len(values["labels"]) or None)
        return cls(directory=Path(directory), **values)

    def write(self) -> ExportedModel:
        """Write export.json, last of all files beside model.onnx, and return self."""
        mark(self.directory, MARKER, self.to_json())
        return self


def read(directory: Path) -> ExportedModel:
    """Read the description that an earlier export left in `directory`; ModelError without one."""
    path = Path(directory) / MARKER
    try:
        return ExportedModel.from_json(path.parent, json.loads(path.read_text(encoding="utf-8")))
    except BertileError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"'{path}' does not describe an exported model: {error}") from error


def files_of(directory: Path) -> list[Path]:
    """The files that an earlier export wrote into `directory`, in order; ModelError without one."""
    read(directory)
    names = json.loads((directory / MARKER).read_text(encoding="utf-8"))["files"]
    return [directory / name for name in sorted(map(str, names))]


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
)
