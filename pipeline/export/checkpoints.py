"""Loads what the user calls MODEL as a torch model, with its family, head and files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bertile.base.errors import ModelError, UsageError, nearest, require
from bertile.base.quiet import quiet
from bertile.export import (
    choices,
    learned_ranges,
    logit_scores,
    objects,
    pretrained,
    pruning,
    synthetic,
)
from bertile.export.files import (
    find_directory,
    fingerprint,
    local_directory,
    transformer_directory,
)
from bertile.export.foreign import explained, ordinary
from bertile.export.sentence_modules import Chain, Normalize, Pool, Score, Words, chain_of
from bertile.families import model_config, table, text_settings
from bertile.families.family import AFTER_PADDING, CAUSAL, Family
from bertile.onnx.exported import TOKENIZER_FILES

# Architectures whose heads are for training alone: their encoder is compiled.
LEFT_OUT = ("ForPreTraining",)
OWN_CODE = "code of its own"  # the family of a checkpoint that brings the code of its model
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
    # of an encoder such a head sees all tokens
    "masked-lm": ("AutoModelForMaskedLM", ("ForMaskedLM", "LMHeadModel", "ForCausalLM")),
    "next-sentence": ("AutoModelForNextSentencePrediction", ("ForNextSentencePrediction",)),
    "multiple-choice": ("AutoModelForMultipleChoice", ("ForMultipleChoice",)),
    CAUSAL: ("AutoModelForCausalLM", ("LMHeadModel", "ForCausalLM")),
    # asked for by name alone: what such a checkpoint is loaded for is its encoder
    "pretraining": ("AutoModelForPreTraining", ()),
}


@dataclass(frozen=True)
class Checkpoint:
    """A float32 torch model in evaluation mode, with eager attention, that is ours to change.

    `ranges` are those of layers' inputs that it was trained with, see `learned_ranges`; `exits` are
    early heads that are compiled with it, see `early_heads`, None for none.
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
    exits: Any = None


def load(
    model: Any,
    head: str | None = None,
    allow_unused: bool = False,
    trust: bool = False,
    labels: tuple[str, ...] = (),
) -> Checkpoint:
    """Load MODEL: `minilm`, `synthetic:NAME[:HEAD][@SPARSITY:PATTERN]`, a directory, a hub id or
    what `objects.opened` takes.

    `head` None takes what the checkpoint's config says. `allow_unused` takes a checkpoint that says
    or holds more than its model reads, `trust` runs the code that it brings; `labels` are words of
    a decoder, see `logit_scores.ids_of`. Raises UsageError for an unknown name, head or label,
    ModelError for a checkpoint that cannot be read.
    """
    if head is not None and head not in HEADS:
        raise UsageError(f"head '{head}' is unknown{nearest(head, HEADS)}")
    with quiet(), ordinary():
        if not isinstance(model, (str, Path)):
            return _from_object(objects.opened(model), head, labels)
        if str(model).startswith("synthetic:"):
            return _from_synthetic(str(model), head, labels)
        directory = find_directory(str(model))
        return _from_directory(str(model), directory, head, allow_unused, trust, labels)


def check(model: str, head: str | None, labels: tuple[str, ...] = ()) -> Path | None:
    """Refuse, without loading anything, a name that nobody knows, a directory that is no supported
    checkpoint, and a head that it cannot have; give its directory.

    None for a synthetic model, and for a hub id that is not on this machine yet. Raises as `load`.
    """
    if model.startswith("synthetic:"):
        name, chosen = synthetic.parse(model, head)
        synthetic.pruned(model)
        _words(labels, chosen, None)
        table.must_have_head(synthetic.SYNTHETIC[name][0], chosen)
        return None
    directory = local_directory(model)
    if directory is not None:
        config = model_config.read(transformer_directory(directory))
        asked, chain, _ = _asked_head(model, directory, config, head, labels)
        table.must_have_head(config["model_type"], _computed(asked, chain))
        if table.of_type(config["model_type"]) is None and not pretrained.own_code(config):
            _auto_class(_computed(asked, chain), config["model_type"], config)
    return directory


def _from_object(
    held: objects.ModelObject, head: str | None, labels: tuple[str, ...]
) -> Checkpoint:
    chain, files, notes = None, (), ()
    if held.directory:
        chain = None if labels else _chain(held.directory, head)
        files, notes = _text_files(held.directory, transformer_directory(held.directory), chain)
    if chain:
        head = _made(chain)
    if head is None:
        architecture = _architecture(held.model)
        family = table.answering(held.model.config.model_type)
        head = _head_of_architectures([architecture], held.name, family)
        notes = _left_out(architecture)
    if labels:
        head, chain = _words(labels, head, held.directory)
    sha256 = fingerprint(held, head)
    with explained(f"'{held.name}' cannot be exported"):
        # A copy, because export sets the model's mode and swaps some of its modules.
        model = objects.copied(held.model)
        model.set_attn_implementation("eager")
        model = _with_head(model, _computed(head, chain), held.name)
    checkpoint = _checkpoint(_plain(model), held.name, sha256, head, chain, files, notes)
    return _named(replace(checkpoint, kept=held), labels)


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
        return _encoder(model.base_model)
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


def _from_synthetic(source: str, head: str | None, labels: tuple[str, ...]) -> Checkpoint:
    name, chosen = synthetic.parse(source, head)
    _must_be_known(synthetic.SYNTHETIC[name][0])
    config = synthetic.config(name)
    family = table.answering(config.model_type)
    model = synthetic.build(_auto_class(chosen, config.model_type), config)
    if asked := synthetic.pruned(source):
        pruning.prune(model, family.name, *asked)
    chain = None
    if labels:
        chosen, chain = _words(labels, chosen, None)
    return _named(_checkpoint(model, source, fingerprint(source, head), chosen, chain), labels)


def _from_directory(
    source: str,
    directory: Path,
    head: str | None,
    allow_unused: bool,
    trust: bool,
    words: tuple[str, ...],
) -> Checkpoint:
    transformer = transformer_directory(directory)
    sha256 = fingerprint(directory, head)  # which refuses links to files outside
    config = model_config.read(transformer)
    head, chain, left_out = _asked_head(source, directory, config, head, words)
    computed = _computed(head, chain)
    own_code = trust and bool(pretrained.own_code(config))
    allowed = pretrained.Allowed(allow_unused, own_code)
    told = pretrained.refuse_other_models(source, transformer, config, allowed)
    if own_code:
        kind = getattr(require("export", "transformers")[0], HEADS[computed][0])
    else:
        kind = _auto_class(computed, config["model_type"], config)
    model, notes = pretrained.load(source, transformer, config, kind, computed, allowed)
    if HEADS[computed][0] == "AutoModel":
        model = _encoder(model)
    notes = (*left_out, *told, *notes)
    files, told = _text_files(directory, transformer, chain)
    notes = (*notes, *told)
    family = table.named(OWN_CODE) if own_code else None
    checkpoint = _checkpoint(_plain(model), source, sha256, head, chain, files, notes, family)
    return _named(replace(checkpoint, ranges=learned_ranges.read(directory)), words)


def _encoder(model: Any) -> Any:
    """The encoder of a model that has a decoder too; any other as it is. Raises ModelError for one
    that transformers never runs alone (FSMT).
    """
    if not getattr(model.config, "is_encoder_decoder", False):
        return model
    encoder = model.get_encoder()
    if not hasattr(encoder, "base_model"):
        raise ModelError(
            f"the encoder of a '{model.config.model_type}' is no model by itself in transformers",
            "write it as an ONNX file, and compile that",
        )
    return encoder


def _computed(head: str, chain: Chain | None) -> str:
    """The head of the transformers model whose outputs are exported, or made an embedding of."""
    if chain and chain.words:
        return CAUSAL
    return "masked-lm" if chain and chain.kind == "sparse" else head


def _chain(directory: Path, head: str | None) -> Chain | None:
    """What follows the transformer of a directory, where that makes what is asked for."""
    chain = chain_of(directory) if head in (None, "embedding") else None
    return None if chain and head not in (None, _made(chain)) else chain


def _words(
    labels: tuple[str, ...], head: str | None, directory: Path | None
) -> tuple[str | None, Chain | None]:
    """The head of a decoder that gives the logits of these words, and what makes them; as it was
    where there are none.
    """
    if not labels:
        return head, None
    if head != CAUSAL:
        raise UsageError(
            f"--labels are words of a decoder's, not of the head '{head}'",
            f"add --head {CAUSAL}, or leave them out: a classifier has labels of its own",
        )
    ids = logit_scores.ids_of(labels, directory and transformer_directory(directory))
    return "sequence-classification", Chain((Pool(("lasttoken",)), Words(ids)))


def _named(checkpoint: Checkpoint, labels: tuple[str, ...]) -> Checkpoint:
    """The same with the words as its labels, where it was asked for such."""
    return replace(checkpoint, labels=labels) if labels else checkpoint


def _made(chain: Chain | None) -> str:
    """The head of what a chain makes."""
    return "sequence-classification" if chain and chain.words else "embedding"


def _asked_head(
    source: str,
    directory: Path,
    config: Mapping[str, Any],
    head: str | None,
    labels: tuple[str, ...] = (),
) -> tuple[str, Chain | None, tuple[str, ...]]:
    """The head, what makes an embedding or a score, and notes for people on what is left out."""
    chain, left_out = None if labels else _chain(directory, head), ()
    if head is None and chain is None:
        architectures = config.get("architectures")
        left_out = _left_out(architectures[0]) if architectures else ()
        family = table.answering(config["model_type"])
        head = _head_of_architectures(architectures, source, family)
    if labels:
        head, chain = _words(labels, head, directory)
    return head or _made(chain), chain, left_out


def _checkpoint(
    model: Any,
    source: str,
    sha256: str,
    head: str,
    chain: Chain | None = None,
    files: tuple[Path, ...] = (),
    notes: tuple[str, ...] = (),
    family: Family | None = None,
) -> Checkpoint:
    family = family or table.answering(model.config.model_type or type(model).__name__)
    if family.causal:
        model.config.use_cache = False  # of keys and values, for the next token
    if getattr(model.config, "is_decoder", False):
        raise ModelError(
            f"'{source}' is a decoder (is_decoder in its config), which is unsupported",
            "Bertile compiles encoders, whose tokens all see each other",
        )
    _must_have_places(model, family, source)
    if family.check is not None:
        family.check(model)
    if head == "embedding" and chain is None:
        sees_all = family.sees_all(model.config)
        chain = Chain() if sees_all else Chain((Pool(("lasttoken",)), Normalize()))
    labels: tuple[str, ...] = ()
    if chain and chain.words:
        logit_scores.keep_words(model, chain.words)
        model.config.id2label = {0: "LABEL_0"}  # as a classifier's of one score
    if head == "multiple-choice":
        choices.score_rows(model)
        notes = (*notes, choices.NOTE)
    if head.endswith("-classification"):
        names = model.config.id2label
        labels = tuple(str(names[index]) for index in sorted(names))
    return Checkpoint(model, source, sha256, family.name, head, chain, files, notes, labels)


def _must_have_places(model: Any, family: Family, source: str) -> None:
    """Refuse a model whose positions count from a padding id that there is not, or have no room."""
    padding = getattr(model.config, "pad_token_id", None)
    if family.positions == AFTER_PADDING and (padding is None or padding < 0):
        raise ModelError(
            f"'{source}' has pad_token_id {padding}, from which its positions would be counted",
            "give it the id that it was trained with",
        )
    longest = family.max_length(model)
    if longest is not None and longest < 1:
        raise ModelError(
            f"'{source}' has no position for a token: pad_token_id {padding} leaves none of"
            f" max_position_embeddings {model.config.max_position_embeddings}"
        )


def _auto_class(
    head: str, model_type: str, config: Mapping[str, Any] = MappingProxyType({})
) -> Any:
    """transformers' auto class for that head; UsageError where the type has no such head.

    Of a type with a decoder, a directory may hold the encoder alone: its config says so.
    """
    table.must_have_head(model_type, head)
    _must_be_known(model_type)
    (transformers,) = require("export", "transformers")
    classes = table.answering(model_type).auto_classes
    kind = getattr(transformers, classes.get(head, HEADS[head][0]))
    if _has(transformers, kind, model_type):
        alone = (config.get("architectures") or [""])[0].endswith("EncoderModel")
        encoders = transformers.AutoModelForTextEncoding
        return encoders if alone and HEADS[head][0] == "AutoModel" else kind
    heads = {head: getattr(transformers, name) for head, (name, _) in HEADS.items()}
    known = [head for head, kind in heads.items() if _has(transformers, kind, model_type)]
    raise UsageError(
        f"models of type '{model_type}' have no head '{head}'; known: {', '.join(known) or 'none'}"
    )


def _has(transformers: Any, kind: Any, model_type: str) -> bool:
    return transformers.CONFIG_MAPPING[model_type] in kind._model_mapping


def _must_be_known(model_type: str) -> None:
    """Refuse a type that the transformers which is installed does not know."""
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


def _text_files(
    directory: Path, transformer: Path, chain: Chain | None
) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """What a bundle takes along of a directory, to make ids of texts; notes for people."""
    asks = chain is not None and any(isinstance(step, Score) for step in chain.steps)
    if asks and logit_scores.has_template(transformer):
        return (), (logit_scores.NOTE,)
    own = ("config.json", *TOKENIZER_FILES, *text_settings.SENTENCES)
    paths = (*(transformer / name for name in own), directory / text_settings.PROMPTS)
    return tuple(path for path in paths if path.is_file()), ()


def _plain(model: Any) -> Any:
    """The model, computed in the usual way and answering with names, whatever its config says."""
    model.config.return_dict = True
    for module in model.modules():
        if getattr(module, "chunk_size_feed_forward", 0):
            module.chunk_size_feed_forward = 0  # the same numbers, all tokens at once
    return model


def _head_of_architectures(architectures: list[str] | None, source: str, family: Family) -> str:
    for name in architectures or ["Model"]:
        endings = [(end, head) for head, (_, ends) in HEADS.items() for end in ends]
        fits = [(len(end), h in family.heads, h) for end, h in endings if name.endswith(end)]
        if fits:
            return max(fits)[2]  # LMHeadModel before Model
    raise ModelError(
        f"'{source}' is a {', '.join(architectures or [])}, whose head is unsupported",
        f"compile its encoder with --head encoder, or choose another: {', '.join(HEADS)}",
    )
