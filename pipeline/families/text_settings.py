"""Reads what a model's directory says of its texts: their prompts, their case, their longest.

The files are transformers' tokenizer_config.json and config.json and two of sentence-transformers.
A compile reads them once; what they say stands in the bundle's manifest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bertile.base.errors import BundleError, ModelError
from bertile.families import model_config
from bertile.families.model_config import read_object

SECTION = "text"  # of a manifest
PROMPTS = "config_sentence_transformers.json"
# Names of old versions of sentence-transformers, in the order in which it looks for them.
SENTENCES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
FILES = (*SENTENCES, PROMPTS)
# transformers' classes that take a tokenizer.json as it is; others set its normalizer anew.
_AS_IT_IS = {"TokenizersBackend", "PreTrainedTokenizer", "PreTrainedTokenizerFast"}
# Prompts that every model of sentence-transformers has, empty where its directory says nothing.
USUAL_PROMPTS = ("query", "document")
WEIGHTS = "token_weights"  # the output with a weight for each token of a text
KINDS = ("dense", "sparse", "tokens")
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
# What sentence-transformers compares embeddings of a kind by, where nothing else is said.
_USUAL_SIMILARITY = {"dense": "cosine", "sparse": "dot", "tokens": "maxsim"}
# torch's classes, by the last part of their dotted names, as a cross-encoder names them.
_ACTIVATIONS = {"Identity": "none", "Sigmoid": "sigmoid", "Softmax": "softmax"}


@dataclass(frozen=True)
class TextSettings:
    """How the texts of one model become ids, and its outputs answers.

    prompts         texts to be put in front, by name, as far as the directory names some
    default_prompt  the name of that which is put in front of every text; None for none
    include_prompt  whether the pooling sees a prompt's tokens, as a bundle's always does: where it
                    should not, no prompt may be used
    lower           whether texts are lowercased first, whatever the tokenizer does
    normalizer      what BERT's normalizer is set to, by its attributes; None leaves it as it is.
                    The tokenizer.json of a bundle is set so, and lowercases, by itself
    longest         tokens to which sentence-transformers cuts a text; None where it is not asked
    cut_at          tokens to which a text is cut where the user wants that; None for no other limit
    side            "left" or "right", where a text is cut; None for what its tokenizer.json says
    padding_id      what fills the rows of a batch
    similarity      how embeddings are compared: of SIMILARITIES, or "maxsim" of the kind tokens
    dimensions      how many of an embedding's first numbers are kept; None for all
    activation      what a cross-encoder makes scores of logits by: "softmax", "sigmoid", "none"
    scores          the same for transformers' pipeline of text classification
    kind            of an embedding: "dense", a vector; "sparse", a vector with a weight for each id
                    of the vocabulary; "tokens", a vector for each token
    pooling         how vectors of tokens become that of a text, in sentence-transformers' words, of
                    several with "+" between them; "splade"; None without, or where it is not known
    """

    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    include_prompt: bool = True
    lower: bool = False
    normalizer: Mapping[str, bool | None] | None = None
    longest: int | None = None
    cut_at: int | None = None
    side: str | None = None
    padding_id: int = 0
    similarity: str = "cosine"
    dimensions: int | None = None
    activation: str = "none"
    scores: str = "softmax"
    kind: str = "dense"
    pooling: str | None = None

    @property
    def prompt(self) -> str:
        """The text of the default prompt, "" without one."""
        return self.prompts.get(self.default_prompt or "", "")

    def to_json(self) -> dict[str, Any]:
        """The settings as a manifest and an export.json hold them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Any) -> TextSettings:
        """The settings that `to_json` gave; BundleError for what this Bertile does not know."""
        known = {known.name for known in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known) if isinstance(fields, dict) else [repr(fields)]
        if unknown:
            raise BundleError(
                f"the settings of texts are unknown here: {', '.join(unknown)}",
                "load it with the version of Bertile that made it, or a newer one",
            )
        return cls(**fields)


def of_bundle(directory: Path, manifest: Mapping[str, Any]) -> TextSettings:
    """The settings of a bundle: those in its manifest; of an older version's, those of its files.

    Raises BundleError for settings of a newer version, ModelError as `read`.
    """
    if SECTION in manifest:
        return TextSettings.from_json(manifest[SECTION])
    return read(directory, len(manifest["model"].get("labels") or ()) or None)


def read(directory: Path, labels: int | None = None, kind: str = "dense") -> TextSettings:
    """What the files in `directory` say; ModelError, naming the file, for what makes no sense.

    `labels` says how many logits a classifier has (None: as many as its config.json says), `kind`
    what its embedding is, which both decide what is usual.
    """
    directory = Path(directory)
    sentences: dict[str, Any] | None = None
    for name in SENTENCES:
        if (directory / name).exists():
            sentences = read_object(directory / name)
            break
    path = directory / "tokenizer_config.json"
    tokens = _object(path)
    general = _object(directory / PROMPTS)
    config = model_config.beside(directory)
    side = tokens.get("truncation_side")
    of_sentences = sentences is not None
    sentences = sentences or {}
    longest = _length(sentences.get("max_seq_length"))
    if of_sentences and longest is None:  # as sentence-transformers does, which saves no other now
        longest = _length(tokens.get("model_max_length"))
    prompts, default = _prompts(directory / PROMPTS, general)
    similarity = general.get("similarity_fn_name")
    labels = labels or len(model_config.labels(config)) or config.get("num_labels") or 2
    return TextSettings(
        prompts=prompts,
        default_prompt=default,
        lower=bool(sentences.get("do_lower_case")),
        normalizer=_normalizer(tokens) if path.exists() else None,
        longest=longest,
        cut_at=longest or _length(tokens.get("model_max_length")),
        side=side if side in ("left", "right") else None,
        padding_id=model_config.padding_id(config),
        similarity=similarity if similarity in SIMILARITIES else _USUAL_SIMILARITY[kind],
        dimensions=_length(general.get("truncate_dim")),
        activation=_activation(directory, config, general, labels),
        scores=scoring(config.get("problem_type"), labels),
        kind=kind,
    )


def _object(path: Path) -> dict[str, Any]:
    return read_object(path) if path.exists() else {}


def _prompts(path: Path, config: Mapping[str, Any]) -> tuple[dict[str, str], str | None]:
    """The prompts that a file names, and the name of the default."""
    held = config.get("prompts")
    held = held if isinstance(held, dict) else {}
    # No text is meant by null.
    prompts = {n: text or "" for n, text in held.items() if text is None or isinstance(text, str)}
    for name in USUAL_PROMPTS:  # PyLate's own, which come before a prompt
        prefix = config.get(f"{name}_prefix")
        if isinstance(prefix, str):
            prompts[name] = prefix + prompts.get(name, "").removeprefix(prefix)
    default = config.get("default_prompt_name")
    if default is None:
        return prompts, None
    if not isinstance(default, str) or default not in (*prompts, *USUAL_PROMPTS):
        raise ModelError(f"'{path}' has no prompt of the name {default!r}, its default")
    return prompts, default


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


def scoring(problem_type: str | None, labels: int) -> str:
    """What transformers' pipeline makes scores of a classifier's logits by: none, sigmoid,
    softmax.
    """
    if problem_type == "regression":
        return "none"
    return "sigmoid" if problem_type == "multi_label_classification" or labels == 1 else "softmax"


def _activation(
    directory: Path, config: Mapping[str, Any], general: Mapping[str, Any], labels: int
) -> str:
    """What sentence-transformers' CrossEncoder makes scores by; ModelError for another function."""
    of_config = config.get("sentence_transformers")
    of_config = of_config.get("activation_fn") if isinstance(of_config, dict) else None
    older = config.get("sbert_ce_default_activation_function")
    name = general.get("activation_fn") or of_config or older
    # Of other packages' functions it takes none either, unless it is told to trust them.
    if not isinstance(name, str) or not name.startswith("torch."):
        return "sigmoid" if labels == 1 else "none"
    activation = _ACTIVATIONS.get(name.rpartition(".")[2])
    if activation is None:
        raise ModelError(
            f"'{directory}' makes scores by '{name}', which is unsupported",
            f"known are torch.nn's {', '.join(_ACTIVATIONS)}: name one of them, and apply yours to"
            " the logits",
        )
    return activation
