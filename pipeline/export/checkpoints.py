"""Loads what the user calls MODEL as a torch model, with its family, head and files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bertile.base.errors import ModelError, UsageError, nearest, require
from bertile.base.quiet import quiet
from bertile.export import choices, learned_ranges, objects, pretrained, pruning, synthetic
from bertile.export.files import (
    find_directory,
    fingerprint,
    local_directory,
    transformer_directory,
)
from bertile.export.foreign import explained, ordinary
from bertile.export.sentence_modules import Chain, chain_of
from bertile.families import model_config, table, text_settings
from bertile.families.family import AFTER_PADDING
from bertile.onnx.exported import TOKENIZER_FILES

# Architectures whose heads are for training alone: their encoder is compiled.
LEFT_OUT = ("ForPreTraining",)
# head: (transformers class that loads it, how the names of its architectures end)
HEADS = {
    "encoder": ("AutoModel", ("Model", *LEFT_OUT)),
    "embedding": ("AutoModel", ()),
    "sequence-classification": (
        "AutoModelForSequenceClassification",
        ("ForSequenceClassification",),
    ),
    "token-classification": ("AutoModelForTokenClassification", ("ForTokenClassification",)),
    "question-answering": ("AutoModelForQuestionAnswering", ("ForQuestionAnswering",)),
    # a decoder is refused, and what else has such a head sees all tokens
    "masked-lm": ("AutoModelForMaskedLM", ("ForMaskedLM", "LMHeadModel", "ForCausalLM")),
    "next-sentence": ("AutoModelForNextSentencePrediction", ("ForNextSentencePrediction",)),
    "multiple-choice": ("AutoModelForMultipleChoice", ("ForMultipleChoice",)),
}


@dataclass(frozen=True)
class Checkpoint:
    """A float32 torch model in evaluation mode, with eager attention, that is ours to change.

    `ranges` are those of layers' inputs that it was trained with, see `learned_ranges`.
    """

    model: Any
    source: str
    sha256: str
    family: str
    head: str
    chain: Chain | None = None
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    kept: Any = None  # what the files are removed with
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def load(model: Any, head: str | None = None, allow_unused: bool = False) -> Checkpoint:
    """Load MODEL: `minilm`, `synthetic:NAME[:HEAD][@SPARSITY:PATTERN]`, a directory, a hub id or
    what `objects.opened` takes.

    `head` None takes what the checkpoint's config says. `allow_unused` takes a checkpoint that says
    or holds more than its model reads. Raises UsageError for an unknown name or head, ModelError
    for a checkpoint that cannot be read or is of an unsupported family.
    """
    if head is not None and head not in HEADS:
        raise UsageError(f"head '{head}' is unknown{nearest(head, HEADS)}")
    with quiet(), ordinary():
        if not isinstance(model, (str, Path)):
            return _from_object(objects.opened(model), head)
        if str(model).startswith("synthetic:"):
            return _from_synthetic(str(model), head)
        return _from_directory(str(model), find_directory(str(model)), head, allow_unused)


def check(model: str, head: str | None) -> Path | None:
    """Refuse, without loading anything, a name that nobody knows, a directory that is no supported
    checkpoint, and a head that it cannot have; give its directory.

    None for a synthetic model, and for a hub id that is not on this machine yet. Raises as `load`.
    """
    if model.startswith("synthetic:"):
        name, chosen = synthetic.parse(model, head)
        synthetic.pruned(model)
        table.must_have_head(synthetic.SYNTHETIC[name][0], chosen)
        return None
    directory = local_directory(model)
    if directory is not None:
        config = model_config.read(transformer_directory(directory))
        asked, chain, _ = _asked_head(model, directory, config, head)
        table.must_have_head(config["model_type"], _computed(asked, chain))
    return directory


def _from_object(held: objects.ModelObject, head: str | None) -> Checkpoint:
    table.supporting(held.model.config.model_type, held.name)
    chain, files, notes = None, (), ()
    if held.directory:
        files = _text_files(held.directory, transformer_directory(held.directory))
        chain = chain_of(held.directory) if head in (None, "embedding") else None
    if chain:
        head = "embedding"
    if head is None:
        architecture = _architecture(held.model)
        head, notes = _head_of_architectures([architecture], held.name), _left_out(architecture)
    sha256 = fingerprint(held, head)
    with explained(f"'{held.name}' cannot be exported"):
        # A copy, because export sets the model's mode and swaps some of its modules.
        model = objects.copied(held.model)
        model.set_attn_implementation("eager")
        model = _with_head(model, _computed(head, chain), held.name)
    checkpoint = _checkpoint(_plain(model), held.name, sha256, head, chain, files, notes)
    return replace(checkpoint, kept=held)


def _architecture(model: Any) -> str:
    """transformers' class of a model, which a program's own class may be made of."""
    transformers, kind = require("export", "transformers")[0], type(model)
    for base in kind.__mro__:
        general = not issubclass(base, transformers.PreTrainedModel) or base.base_model_prefix == ""
        known = base.__module__.startswith("transformers.") and not general
        if known and not base.__name__.endswith("PreTrainedModel"):
            return base.__name__
    # What is no part of a larger model is an encoder, by whatever name.
    return "Model" if model.base_model is model else f"{kind.__name__}, a class of its own"


def _with_head(model: Any, head: str, name: str) -> Any:
    """The model, its encoder, or that below another head for which the model has weights.

    UsageError where it has none.
    """
    auto_class, endings = HEADS[head]
    if auto_class == "AutoModel":
        return model.base_model
    if _architecture(model).endswith(endings):
        return model
    settings = model.config
    other = _auto_class(head, settings.model_type).from_config(settings)
    prefix, base = other.base_model_prefix, model.base_model
    # An encoder's own names lack the prefix.
    inner = {f"{prefix}.{key}": tensor for key, tensor in base.state_dict().items()}
    held, asked = {**model.state_dict(), **inner}, other.state_dict()
    absent = [key for key in asked if key not in held or held[key].shape != asked[key].shape]
    if absent:
        raise UsageError(
            f"a {name} has no weights for the head '{head}' (no {absent[0]})",
            "choose the head that it was trained with",
        )
    other.load_state_dict(held, strict=False)
    setattr(other, prefix, base)
    other.set_attn_implementation("eager")
    return other.eval()


def _from_synthetic(source: str, head: str | None) -> Checkpoint:
    name, chosen = synthetic.parse(source, head)
    _must_be_known(synthetic.SYNTHETIC[name][0])
    config = synthetic.config(name)
    family = table.supporting(config.model_type, source)
    model = synthetic.build(_auto_class(chosen, config.model_type), config)
    if asked := synthetic.pruned(source):
        pruning.prune(model, family.name, *asked)
    return _checkpoint(model, source, fingerprint(source, head), chosen)


def _from_directory(
    source: str, directory: Path, head: str | None, allow_unused: bool
) -> Checkpoint:
    transformer = transformer_directory(directory)
    sha256 = fingerprint(directory, head)  # which refuses links to files outside
    config = model_config.read(transformer)
    head, chain, left_out = _asked_head(source, directory, config, head)
    computed = _computed(head, chain)
    auto_class = _auto_class(computed, config["model_type"])
    model, notes = pretrained.load(source, transformer, config, auto_class, computed, allow_unused)
    notes = (*left_out, *notes)
    files = _text_files(directory, transformer)
    checkpoint = _checkpoint(_plain(model), source, sha256, head, chain, files, notes)
    return replace(checkpoint, ranges=learned_ranges.read(directory))


def _computed(head: str, chain: Chain | None) -> str:
    """The head of the transformers model whose outputs are exported, or made an embedding of."""
    return "masked-lm" if chain and chain.kind == "sparse" else head


def _asked_head(
    source: str, directory: Path, config: Mapping[str, Any], head: str | None
) -> tuple[str, Chain | None, tuple[str, ...]]:
    """The head, what makes an embedding, and notes for people on what is left out."""
    chain = chain_of(directory) if head in (None, "embedding") else None
    if head is not None or chain is not None:
        return head or "embedding", chain, ()
    architectures = config.get("architectures")
    left_out = _left_out(architectures[0]) if architectures else ()
    return _head_of_architectures(architectures, source), None, left_out


def _checkpoint(
    model: Any,
    source: str,
    sha256: str,
    head: str,
    chain: Chain | None = None,
    files: tuple[Path, ...] = (),
    notes: tuple[str, ...] = (),
) -> Checkpoint:
    family = table.supporting(model.config.model_type, source).name
    if getattr(model.config, "is_decoder", False):
        raise ModelError(
            f"'{source}' is a decoder (is_decoder in its config), which is unsupported",
            "Bertile compiles encoders, whose tokens all see each other",
        )
    _must_have_places(model, source)
    if head == "embedding" and chain is None:
        chain = Chain()
    labels: tuple[str, ...] = ()
    if head == "multiple-choice":
        choices.score_rows(model)
        notes = (*notes, choices.NOTE)
    if head.endswith("-classification"):
        names = model.config.id2label
        labels = tuple(str(names[index]) for index in sorted(names))
    return Checkpoint(model, source, sha256, family, head, chain, files, notes, labels)


def _must_have_places(model: Any, source: str) -> None:
    """Refuse a model whose positions count from a padding id that there is not, or have no room."""
    family, padding = table.of_type(model.config.model_type), model.config.pad_token_id
    if family.positions == AFTER_PADDING and (padding is None or padding < 0):
        raise ModelError(
            f"'{source}' has pad_token_id {padding}, from which its positions would be counted",
            "give it the id that it was trained with",
        )
    if family.max_length(model) < 1:
        raise ModelError(
            f"'{source}' has no position for a token: pad_token_id {padding} leaves none of"
            f" max_position_embeddings {model.config.max_position_embeddings}"
        )


def _auto_class(head: str, model_type: str) -> Any:
    """transformers' auto class for that head; UsageError where the family has no such head."""
    table.must_have_head(model_type, head)
    _must_be_known(model_type)
    (transformers,) = require("export", "transformers")
    classes = table.of_type(model_type).auto_classes
    return getattr(transformers, classes.get(head, HEADS[head][0]))


def _must_be_known(model_type: str) -> None:
    """Refuse a family that the transformers which is installed is too old for."""
    (transformers,) = require("export", "transformers")
    if model_type not in transformers.CONFIG_MAPPING:
        raise ModelError(
            f"transformers {transformers.__version__} has no models of type '{model_type}'",
            "install a newer one: pip install --upgrade transformers",
        )


def _left_out(architecture: str) -> tuple[str, ...]:
    """Notes for people on a head that is not compiled."""
    if not architecture.endswith(LEFT_OUT):
        return ()
    return (f"left out: the head of {architecture}, of which the encoder is compiled",)


def _text_files(directory: Path, transformer: Path) -> tuple[Path, ...]:
    """What a bundle takes along of a directory, to make ids of texts."""
    own = ("config.json", *TOKENIZER_FILES, *text_settings.SENTENCES)
    paths = (*(transformer / name for name in own), directory / text_settings.PROMPTS)
    return tuple(path for path in paths if path.is_file())


def _plain(model: Any) -> Any:
    """The model, computed in the usual way and answering with names, whatever its config says."""
    model.config.return_dict = True
    for module in model.modules():
        if getattr(module, "chunk_size_feed_forward", 0):
            module.chunk_size_feed_forward = 0  # the same numbers, all tokens at once
    return model


def _head_of_architectures(architectures: list[str] | None, source: str) -> str:
    for name in architectures or ["Model"]:
        endings = [(end, head) for head, (_, ends) in HEADS.items() for end in ends]
        fits = [(len(end), head) for end, head in endings if name.endswith(end)]
        if fits:
            return max(fits)[1]  # LMHeadModel before Model
    raise ModelError(
        f"'{source}' is a {', '.join(architectures or [])}, whose head is unsupported",
        f"compile its encoder with --head encoder, or choose another: {', '.join(HEADS)}",
    )
