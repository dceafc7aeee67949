"""Loads what the user calls MODEL as a torch model, with its family, head and files."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bertile.base.errors import ModelError, UsageError, nearest, require
from bertile.base.quiet import quiet
from bertile.export import pretrained, pruning, synthetic
from bertile.export.files import (
    Pooling,
    find_directory,
    fingerprint,
    pooling_of,
    transformer_directory,
)
from bertile.families import model_config, table, text_settings
from bertile.families.family import AFTER_PADDING, Family
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


def load(model: Any, head: str | None = None, allow_unused: bool = False) -> Checkpoint:
    """Load MODEL: `minilm`, `synthetic:NAME[:HEAD][@SPARSITY:PATTERN]`, a directory, a hub id or a
    PreTrainedModel.

    `head` None takes what the checkpoint's config says. `allow_unused` takes a checkpoint that says
    or holds more than its model reads. Raises UsageError for an unknown name or head, ModelError
    for a checkpoint that cannot be read or is of an unsupported family.
    """
    if head is not None and head not in HEADS:
        raise UsageError(f"head '{head}' is unknown{nearest(head, HEADS)}")
    with quiet():
        if not isinstance(model, (str, Path)):
            return _from_object(model, head)
        if str(model).startswith("synthetic:"):
            return _from_synthetic(str(model), head)
        return _from_directory(str(model), find_directory(str(model)), head, allow_unused)


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
    return _checkpoint(_plain(model), type(model).__name__, sha256, head or own)


def _from_synthetic(source: str, head: str | None) -> Checkpoint:
    (transformers,) = require("export", "transformers")
    name, chosen = synthetic.parse(source, head)
    config = synthetic.config(name)
    family = table.supporting(config.model_type, source)
    model = synthetic.build(getattr(transformers, _auto_class(family, chosen)), config)
    if asked := synthetic.pruned(source):
        pruning.prune(model, family.name, *asked)
    return _checkpoint(model, source, fingerprint(source, head), chosen)


def _from_directory(
    source: str, directory: Path, head: str | None, allow_unused: bool
) -> Checkpoint:
    transformer = transformer_directory(directory)
    sha256 = fingerprint(directory, head)  # which refuses links to files outside
    config = model_config.read(transformer)
    family = table.of_type(config["model_type"])
    pooling = pooling_of(directory) if head in (None, "embedding") else None
    if head is None and pooling is None:
        head = _head_of_architectures(config.get("architectures"), source)
    head = head or "embedding"
    auto_class = _auto_class(family, head)
    model, notes = pretrained.load(source, transformer, config, auto_class, head, allow_unused)
    own = ("config.json", *TOKENIZER_FILES, *text_settings.SENTENCES)
    paths = (*(transformer / name for name in own), directory / text_settings.PROMPTS)
    files = tuple(path for path in paths if path.is_file())
    return _checkpoint(_plain(model), source, sha256, head, pooling, files, notes)


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
    _must_have_places(model, source)
    if head == "embedding" and pooling is None:
        pooling = Pooling()
    labels: tuple[str, ...] = ()
    if head.endswith("-classification"):
        names = model.config.id2label
        labels = tuple(str(names[index]) for index in sorted(names))
    return Checkpoint(model, source, sha256, family, head, pooling, files, notes, labels)


def _must_have_places(model: Any, source: str) -> None:
    """Refuse a model whose positions count from a padding id that there is not, or have no room."""
    family, padding = table.of_type(model.config.model_type), model.config.pad_token_id
    if family.positions == AFTER_PADDING and (padding is None or padding < 0):
        raise ModelError(
            f"'{source}' has pad_token_id {padding}, behind which its positions would count",
            "give it the id that it was trained with",
        )
    if family.max_length(model) < 1:
        raise ModelError(
            f"'{source}' has no position for a token: pad_token_id {padding} leaves none of"
            f" max_position_embeddings {model.config.max_position_embeddings}"
        )


def _auto_class(family: Family, head: str) -> str:
    return family.auto_classes.get(head, HEADS[head][0])


def _plain(model: Any) -> Any:
    """The model, computed in the usual way and answering with names, whatever its config says."""
    model.config.return_dict = True
    for module in model.modules():
        if getattr(module, "chunk_size_feed_forward", 0):
            module.chunk_size_feed_forward = 0  # the same numbers, all tokens at once
    return model


def _head_of_architectures(architectures: list[str] | None, source: str) -> str:
    for name in architectures or ["Model"]:
        for head, (_, endings) in HEADS.items():
            if name.endswith(endings):
                return head
    raise ModelError(
        f"'{source}' is a {', '.join(architectures or [])}, whose head is unsupported",
        f"choose one with --head: {', '.join(HEADS)}",
    )
