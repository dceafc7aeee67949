"""Reads sentence-transformers' modules.json: what follows a transformer to make an embedding or a
score.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bertile.base.errors import ModelError
from bertile.families import text_settings
from bertile.families.model_config import read_object
from bertile.onnx.source_files import inside

TOKENS, SENTENCE = "token_embeddings", "sentence_embedding"  # as sentence-transformers calls them
# Kinds of pooling, in the order in which older versions join them, and their flags of that time.
POOLINGS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
# torch.nn's modules that a Dense may end with.
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "Sigmoid", "SiLU")
TRANSFORMERS = ("Transformer", "MLMTransformer")
# Modules that have weights of their own.
WEIGHTED = ("Dense", "LayerNorm")
SUPPORTED = (
    *("Transformer", "Pooling", "Dense", "Normalize", "LayerNorm"),
    *("MLMTransformer", "SpladePooling", "MultiVectorMask", "LogitScore"),
)
# What BGE-M3's own library computes beside a vector, by the file of the linear layer that it takes.
BESIDE = {"sparse_linear.pt": text_settings.WEIGHTS, "colbert_linear.pt": TOKENS}
_OTHERWISE = "compile it with --head encoder"


@dataclass(frozen=True)
class Pool:
    """Token vectors to vectors of POOLINGS' kinds, joined in this order."""

    modes: tuple[str, ...] = ("mean",)


@dataclass(frozen=True)
class Splade:
    """A masked-lm head's logits to a weight for each id of the vocabulary.

    `strategy` is "max" or "sum" over the tokens; with `twice`, log(1 + x) is applied twice.
    """

    strategy: str = "max"
    twice: bool = False


@dataclass(frozen=True)
class Dense:
    """A linear layer whose weights lie in `directory`, torch.nn's `activation`, a residual."""

    directory: Path
    activation: str = "Tanh"
    residual: bool = False


@dataclass(frozen=True)
class LayerNorm:
    """torch.nn's, whose weights lie in `directory`."""

    directory: Path


@dataclass(frozen=True)
class Normalize:
    """Vectors to unit length."""


@dataclass(frozen=True)
class Score:
    """The logit of a word for yes, less that of a word for no where there is one; by their ids."""

    ids: tuple[int, ...]


@dataclass(frozen=True)
class Words:
    """The logits of words, one each, by their ids."""

    ids: tuple[int, ...]


Step = Pool | Splade | Dense | LayerNorm | Normalize | Score | Words


@dataclass(frozen=True)
class Chain:
    """How the outputs of a transformer become an embedding or a score, step by step.

    `include_prompt` is False where the pooling should not see the tokens of a prompt. `beside` are
    the files of BESIDE, whose outputs come beside the embedding.
    """

    steps: tuple[Step, ...] = (Pool(), Normalize())
    include_prompt: bool = True
    beside: tuple[Path, ...] = ()

    @property
    def words(self) -> tuple[int, ...]:
        """The ids whose logits it gives or makes a score of; () of one that makes an embedding."""
        return next((step.ids for step in self.steps if isinstance(step, (Score, Words))), ())

    @property
    def kind(self) -> str:
        """Of text_settings.KINDS: a vector, a vector of the vocabulary, or a vector a token."""
        if any(isinstance(step, Splade) for step in self.steps):
            return "sparse"
        return "dense" if any(isinstance(step, Pool) for step in self.steps) else "tokens"

    @property
    def pooling(self) -> str | None:
        """How it makes a text's vector of those of its tokens; None where it makes none."""
        if self.kind == "sparse":
            return "splade"
        if self.words:
            return None
        modes = next((step.modes for step in self.steps if isinstance(step, Pool)), ())
        return "+".join(modes) or None

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of what it makes."""
        if self.words:
            return ("logits",)
        output = TOKENS if self.kind == "tokens" else SENTENCE
        return (output, *(BESIDE[path.name] for path in self.beside))


def modules_of(directory: Path) -> list[tuple[str, Path]]:
    """The class and the directory of each module that modules.json names; [] without that file."""
    path = directory / "modules.json"
    if not path.is_file():
        return []
    try:
        modules = json.loads(inside(path, directory).read_text(encoding="utf-8"))
        named = [(entry["type"].rpartition(".")[2], entry["path"]) for entry in modules]
        return [(kind, inside(directory / place, directory)) for kind, place in named]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"'{path}' cannot be read: {error!r}") from error


def chain_of(directory: Path) -> Chain | None:
    """What follows the transformer in modules.json; None where nothing does.

    Raises ModelError, with names, for a module or a setting of it that is unsupported.
    """
    modules = modules_of(directory)
    named = [kind for kind, _ in modules if kind not in TRANSFORMERS]
    if not named:
        return None
    for kind in named:
        if kind not in SUPPORTED:
            raise ModelError(
                f"'{directory}' has the sentence-transformers module {kind}, which is unsupported",
                f"supported: {', '.join(SUPPORTED)}; or {_OTHERWISE}",
            )
    steps: list[Any] = []
    state, include_prompt = TOKENS, True
    for kind, path in modules:
        config = _config(path)
        if kind in TRANSFORMERS or kind == "MultiVectorMask":
            continue  # the last says which vectors of tokens are compared, and changes none
        if kind == "LogitScore":
            steps.append(Pool(("lasttoken",)))
        elif kind in ("Pooling", "SpladePooling", "LayerNorm"):
            _must_act_on(SENTENCE if kind == "LayerNorm" else TOKENS, state, kind, path)
        else:
            _must_act_on(_acts_on(kind, config, state, path), state, kind, path)
        if kind == "Pooling":
            include_prompt = config.get("include_prompt") is not False
        steps.append(_step(kind, config, path))
        state = SENTENCE if kind in ("Pooling", "SpladePooling") else state
    last = steps[-1] if steps else None
    if state == TOKENS and _is_of_pylate(directory) and not isinstance(last, Normalize):
        steps.append(Normalize())
    dense = any(isinstance(step, Pool) for step in steps) and state == SENTENCE
    beside = [directory / name for name in BESIDE if dense and (directory / name).is_file()]
    chain = Chain(tuple(steps), include_prompt, tuple(inside(path, directory) for path in beside))
    _must_fit(chain, modules, directory)
    return chain


def _config(path: Path) -> dict[str, Any]:
    """A module's settings: {} of one that has none, and so no file."""
    return read_object(path / "config.json") if (path / "config.json").exists() else {}


def _step(kind: str, config: Mapping[str, Any], path: Path) -> Any:
    if kind == "Pooling":
        return Pool(_modes(config, path))
    if kind == "LogitScore":
        ids = [config.get(f"{word}_token_id") for word in ("true", "false")]
        if type(ids[0]) is not int or type(ids[1]) not in (int, type(None)):
            raise ModelError(f"the LogitScore in '{path}' names no ids of words: {ids}")
        return Score(tuple(number for number in ids if number is not None))
    if kind == "SpladePooling":
        strategy = _of(config, "pooling_strategy", "max", ("max", "sum"), path)
        function = _of(config, "activation_function", "relu", ("relu", "log1p_relu"), path)
        return Splade(strategy, function == "log1p_relu")
    if kind == "Dense":
        return Dense(path, _activation(config, path), config.get("use_residual") is True)
    return LayerNorm(path) if kind == "LayerNorm" else Normalize()


def _modes(config: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    """The kinds of a Pooling, in the order in which their vectors are joined."""
    flags = [mode for mode, flag in POOLINGS.items() if config.get(flag)]
    mode = config.get("pooling_mode") or flags
    modes = mode if isinstance(mode, list) else [mode]
    known = (*POOLINGS.values(), "pooling_mode")
    unknown = [mode for mode in modes if mode not in POOLINGS]
    unknown += [k for k, on in config.items() if on and k[:12] == "pooling_mode" and k not in known]
    if unknown:
        raise ModelError(
            f"pooling {' + '.join(map(str, unknown))} of '{path}' is unsupported",
            f"known: {', '.join(POOLINGS)}; or {_OTHERWISE}",
        )
    return tuple(modes) or ("mean",)  # as sentence-transformers does where all is off


def _activation(config: Mapping[str, Any], path: Path) -> str:
    """The name in torch.nn of what a Dense ends with, which is a dotted name in its file."""
    name = config.get("activation_function", "torch.nn.modules.activation.Tanh")
    short = str(name).rpartition(".")[2]
    if not str(name).startswith("torch.nn.") or short not in ACTIVATIONS:
        raise ModelError(
            f"the activation_function {name} of '{path}' is unsupported",
            f"known are torch.nn's {', '.join(ACTIVATIONS)}; or {_OTHERWISE}",
        )
    return short


def _of(config: Mapping[str, Any], key: str, usual: str, known: tuple[str, ...], path: Path) -> str:
    value = config.get(key, usual)
    if value not in known:
        raise ModelError(
            f"{key} {value!r} of '{path}' is unsupported", f"known: {', '.join(known)}"
        )
    return str(value)


def _acts_on(kind: str, config: Mapping[str, Any], state: str, path: Path) -> str:
    """What a Dense or a Normalize reads, and writes in its place."""
    # A Dense of a time before these names acts on what there is.
    source = config.get("module_input_name") or (state if kind == "Dense" else SENTENCE)
    target = config.get("module_output_name") or source
    if source != target:
        raise ModelError(
            f"the {kind} in '{path}' makes {target} of {source}, which is unsupported", _OTHERWISE
        )
    return str(source)


def _must_act_on(source: str, state: str, kind: str, path: Path) -> None:
    if source != state:
        raise ModelError(
            f"the {kind} in '{path}' acts on {source} where there is {state}", _OTHERWISE
        )


def _must_fit(chain: Chain, modules: list[tuple[str, Path]], directory: Path) -> None:
    """Refuse logits that are pooled as vectors, or the other way round, and prompts that a pooling
    should not see.
    """
    if chain.words:
        _must_score(modules, directory)
        return
    kind, place = next(
        ((k, p) for k, p in modules if k in TRANSFORMERS), ("Transformer", directory)
    )
    fills = kind == "MLMTransformer" or _task(place) == "fill-mask"
    sparse = chain.kind == "sparse"
    if fills != sparse:
        has, lacks = ("SpladePooling", "masked-lm head") if sparse else ("masked-lm head", "Splade")
        raise ModelError(
            f"'{directory}' has a {has} without a {lacks}, which is unsupported", _OTHERWISE
        )
    if sparse and not all(isinstance(step, (Splade, Normalize)) for step in chain.steps):
        raise ModelError(
            f"'{directory}' computes something of weights of the vocabulary, which is unsupported",
            "supported behind a SpladePooling: Normalize",
        )
    prompts = text_settings.read(directory).prompts
    if not chain.include_prompt and any(prompts.values()):
        name = next(name for name, text in prompts.items() if text)
        raise ModelError(
            f"'{directory}' leaves its prompt '{name}' out of the pooling (include_prompt), which"
            " is unsupported",
            _OTHERWISE,
        )


def _must_score(modules: list[tuple[str, Path]], directory: Path) -> None:
    """Refuse anything beside a model that writes texts and the score of its logits."""
    kinds = [kind for kind, _ in modules]
    task = _task(modules[0][1]) if modules else None
    if kinds != ["Transformer", "LogitScore"] or task != "text-generation":
        raise ModelError(
            f"'{directory}' has {', '.join(kinds)} for {task or 'no task'}, which is unsupported",
            "a LogitScore is supported behind one Transformer for text-generation",
        )


def _task(transformer: Path) -> str | None:
    """The head that a Transformer of newer versions is said to have."""
    for name in text_settings.SENTENCES:
        if (transformer / name).exists():
            return read_object(transformer / name).get("transformer_task")
    return None


def _is_of_pylate(directory: Path) -> bool:
    """Whether PyLate saved it, which normalizes without a module for it."""
    path = directory / text_settings.PROMPTS
    return path.exists() and read_object(path).get("model_type") == "ColBERT"
