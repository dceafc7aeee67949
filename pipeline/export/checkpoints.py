"""Loads what the user calls MODEL as a torch model, with its family, head and files."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bertile.base.errors import ModelError, UsageError, nearest, require
from bertile.base.quiet import quiet
from bertile.export import pruning, synthetic
from bertile.export.files import (
    Pooling,
    find_directory,
    fingerprint,
    pooling_of,
    transformer_directory,
)
from bertile.families import table
from bertile.families.family import Family
from bertile.onnx.exported import TOKENIZER_FILES

# head: (transformers class that loads it, how the names of its architectures end)
HEADS = {
    "encoder": ("AutoModel", ("Model", "ForPreTraining")),
    "embedding": ("AutoModel", ()),
    "sequence-classification": (
        "AutoModelForSequenceClassification",
        ("ForSequenceClassification",),
    ),
    "token-classification": ("AutoModelForTokenClassification", ("ForTokenClassification",)),
    "question-answering": ("AutoModelForQuestionAnswering", ("ForQuestionAnswering",)),
    "masked-lm": ("AutoModelForMaskedLM", ("ForMaskedLM", "WithLMHeadModel")),
}


@dataclass(frozen=True)
class Checkpoint:
    """A float32 torch model in evaluation mode, with eager attention, that is ours to change."""

    model: Any
    source: str
    sha256: str
    family: str
    head: str
    pooling: Pooling | None = None
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()


def load(model: Any, head: str | None = None) -> Checkpoint:
    """Load MODEL: `minilm`, `synthetic:NAME[:HEAD][@SPARSITY:PATTERN]`, a directory, a hub id or a
    PreTrainedModel.

    `head` None takes what the checkpoint's config says. Raises UsageError for an unknown name or
    head, ModelError for a checkpoint that cannot be read or is of an unsupported family.
    """
    if head is not None and head not in HEADS:
        raise UsageError(f"head '{head}' is unknown{nearest(head, HEADS)}")
    with quiet():
        if not isinstance(model, (str, Path)):
            return _from_object(model, head)
        if str(model).startswith("synthetic:"):
            return _from_synthetic(str(model), head)
        return _from_directory(str(model), find_directory(str(model)), head)


def _from_object(model: Any, head: str | None) -> Checkpoint:
    if not hasattr(model, "config") or not hasattr(model, "state_dict"):
        raise UsageError(
            f"cannot compile a {type(model).__name__}",
            "give a path, a name, or a transformers PreTrainedModel",
        )
    own = _head_of_architectures([type(model).__name__], type(model).__name__)
    if head not in (None, own) and (head, own) != ("embedding", "encoder"):
        raise UsageError(f"a {type(model).__name__} has the head '{own}', not '{head}'")
    sha256 = fingerprint(model, head)
    # A copy, because export sets the model's mode and swaps some of its modules.
    model = copy.deepcopy(model).float().cpu().eval()
    model.set_attn_implementation("eager")
    return _checkpoint(model, type(model).__name__, sha256, head or own)


def _from_synthetic(source: str, head: str | None) -> Checkpoint:
    (transformers,) = require("export", "transformers")
    name, chosen = synthetic.parse(source, head)
    config = synthetic.config(name)
    family = table.supporting(config.model_type, source)
    model = synthetic.build(getattr(transformers, _auto_class(family, chosen)), config)
    if asked := synthetic.pruned(source):
        pruning.prune(model, family.name, *asked)
    return _checkpoint(model, source, fingerprint(source, head), chosen)


def _from_directory(source: str, directory: Path, head: str | None) -> Checkpoint:
    transformer = transformer_directory(directory)
    config = _read_config(transformer)
    family = table.supporting(config["model_type"], str(transformer))
    pooling = pooling_of(directory) if head in (None, "embedding") else None
    if head is None and pooling is None:
        head = _head_of_architectures(config["architectures"], source)
    head = head or "embedding"
    model, notes = _pretrained(source, transformer, family, head)
    names = ("config.json", *TOKENIZER_FILES)
    files = tuple(transformer / name for name in names if (transformer / name).is_file())
    sha256 = fingerprint(directory, head)
    return _checkpoint(model, source, sha256, head, pooling, files, notes)


def _checkpoint(
    model: Any,
    source: str,
    sha256: str,
    head: str,
    pooling: Pooling | None = None,
    files: tuple[Path, ...] = (),
    notes: tuple[str, ...] = (),
) -> Checkpoint:
    family = table.supporting(model.config.model_type, source).name
    if getattr(model.config, "is_decoder", False):
        raise ModelError(f"'{source}' is a decoder", "Bertile compiles encoders")
    if head == "embedding" and pooling is None:
        pooling = Pooling()
    labels: tuple[str, ...] = ()
    if head.endswith("-classification"):
        names = model.config.id2label
        labels = tuple(str(names[index]) for index in sorted(names))
    return Checkpoint(model, source, sha256, family, head, pooling, files, notes, labels)


def _auto_class(family: Family, head: str) -> str:
    return family.auto_classes.get(head, HEADS[head][0])


def _pretrained(
    source: str, directory: Path, family: Family, head: str
) -> tuple[Any, tuple[str, ...]]:
    torch, transformers = require("export", "torch", "transformers")
    auto_class = getattr(transformers, _auto_class(family, head))
    try:
        model, report = auto_class.from_pretrained(
            directory,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
            local_files_only=True,
        )
    except Exception as error:  # whatever a damaged file makes the libraries raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ModelError(f"the weights in '{directory}' cannot be loaded: {reason}") from error
    missing = sorted(report["missing_keys"])
    pooler = [key for key in missing if ".pooler." in f".{key}"]
    if len(pooler) < len(missing):
        absent = next(key for key in missing if key not in pooler)
        raise ModelError(
            f"'{source}' has no weights for the head '{head}' (no {absent})",
            "choose the head that it was trained with",
        )
    if not pooler:
        return model.eval(), ()
    model.base_model.pooler = None
    return model.eval(), ("the checkpoint has no pooler weights: no pooler_output",)


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(
            f"'{directory}' has no config.json", "give the directory that save_pretrained wrote"
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError(f"'{path}' cannot be read: {error}") from error
    return {"architectures": [], "model_type": None, **config}


def _head_of_architectures(architectures: list[str] | None, source: str) -> str:
    for name in architectures or ["Model"]:
        for head, (_, endings) in HEADS.items():
            if name.endswith(endings):
                return head
    raise ModelError(
        f"'{source}' is a {', '.join(architectures or [])}, whose head is unsupported",
        f"choose one with --head: {', '.join(HEADS)}",
    )
