"""Reads recipes: small JSON files that say what becomes of a model, of which several combine.

A recipe has any of the sections below. Of several recipes, and of single settings behind them, the
later one has the last word on each key.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bertile.base.errors import UsageError, nearest

PATTERNS = ("unstructured", "4x1", "16x1", "2:4")
METHODS = ("magnitude", "movement", "soft-movement", "one-shot", "second-order")
TRAINED = ("magnitude", "movement", "soft-movement")
RANGES = ("dynamic", "static")
ATTENTION = ("auto", "bf16", "fp32")
FORMS = ("k-means", "binary")
MIXED = ("no", "fp16", "bf16")
SHIPPED = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Depth:
    """The student's encoder layers: `layers` of them, evenly taken, or those that `keep` names."""

    layers: int | None = None
    keep: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Structured:
    """The shares of all attention heads and of all neurons that go, those of least effect."""

    heads: float = 0.0
    neurons: float = 0.0
    batches: int = 32  # that the effect is seen on


@dataclass(frozen=True)
class Prune:
    """Zeros in every linear layer of the encoder.

    Those that train reach `sparsity` between the shares `begin` and `end` of all steps. `rewind` is
    the share of steps behind which weights are kept, that training goes back to with the final
    zeros (lottery tickets). `score_rate` is movement's learning rate of scores, `penalty` the
    weight of soft movement's.
    """

    method: str = "magnitude"
    pattern: str = "4x1"
    sparsity: float = 0.9
    begin: float = 0.05
    end: float = 0.6
    every: int = 10  # steps between two masks
    rewind: float | None = None
    score_rate: float = 1e-2
    penalty: float = 10.0
    texts: int = 256  # that second order looks at


@dataclass(frozen=True)
class Distill:
    """What the student learns from the teacher; each number is the weight of its loss.

    `labels` is that of the labels themselves. `hidden` and `attention` are TinyBERT's; `cosine` and
    `similarities` are for embeddings.
    """

    soft: float = 1.0
    temperature: float = 2.0
    labels: float = 0.0
    hidden: float = 0.0
    attention: float = 0.0
    cosine: float = 1.0
    similarities: float = 1.0


@dataclass(frozen=True)
class Quantize:
    """Training in the int8 of the compiler, from the share `begin` of all steps on.

    `ranges` "static" learns the ends of each layer's input, which the compile then uses.
    `attention` is what the target multiplies in: "auto" what this machine does.
    """

    ranges: str = "dynamic"
    attention: str = "auto"
    begin: float = 0.0


@dataclass(frozen=True)
class EarlyExit:
    """Heads behind these encoder layers (counted from 1), which learn from the last one's."""

    layers: tuple[int, ...] = ()
    weight: float = 1.0


@dataclass(frozen=True)
class Storage:
    """Weights of few values: `clusters` by k-means in each layer, or binary with a scale."""

    form: str = "k-means"
    clusters: int = 16


@dataclass(frozen=True)
class Train:
    """How long and how fast; `epochs` counts where `steps` is left out. `longest` is in tokens."""

    steps: int | None = None
    epochs: float = 3.0
    batch: int = 32
    rate: float = 2e-4
    warmup: float = 0.06
    decay: float = 0.01
    clip: float = 1.0
    longest: int = 128
    seed: int = 20
    dropout: float | None = None  # None: the model's own
    precision: str = "no"
    save_every: int = 200


@dataclass(frozen=True)
class Recipe:
    """All sections; None for what is not to be done."""

    depth: Depth | None = None
    structured: Structured | None = None
    prune: Prune | None = None
    distill: Distill | None = None
    quantize: Quantize | None = None
    early_exit: EarlyExit | None = None
    storage: Storage | None = None
    train: Train = field(default_factory=Train)

    def to_dict(self) -> dict[str, Any]:
        """The sections that are there, as plain values."""
        sections = dataclasses.asdict(self)
        return {name: values for name, values in sections.items() if values is not None}

    @property
    def trains(self) -> bool:
        """Whether there are steps to take."""
        return self.train.steps != 0


SECTIONS = {
    "depth": Depth,
    "structured": Structured,
    "prune": Prune,
    "distill": Distill,
    "quantize": Quantize,
    "early_exit": EarlyExit,
    "storage": Storage,
    "train": Train,
}
CHOICES = {
    ("prune", "method"): METHODS,
    ("prune", "pattern"): PATTERNS,
    ("quantize", "ranges"): RANGES,
    ("quantize", "attention"): ATTENTION,
    ("storage", "form"): FORMS,
    ("train", "precision"): MIXED,
}
SHARES = {
    ("structured", "heads"),
    ("structured", "neurons"),
    ("prune", "sparsity"),
    ("prune", "begin"),
    ("prune", "end"),
    ("prune", "rewind"),
    ("quantize", "begin"),
    ("train", "warmup"),
    ("train", "dropout"),
}


def names() -> list[str]:
    """The recipes that come with Bertile."""
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


def read(recipes: Sequence[str], settings: Iterable[str] = ()) -> Recipe:
    """Combine recipes, each a shipped name or a JSON file, and settings SECTION.KEY=VALUE.

    Raises UsageError for what there is not, with the nearest that there is.
    """
    combined: dict[str, dict[str, Any]] = {}
    for name in recipes:
        for section, values in _sections(name).items():
            combined.setdefault(section, {}).update(values)
    for setting in settings:
        section, key, value = _setting(setting)
        combined.setdefault(section, {})[key] = value
    return from_dict(combined)


def from_dict(sections: Mapping[str, Mapping[str, Any]]) -> Recipe:
    """A Recipe of plain values; UsageError for an unknown key or a value that cannot be."""
    sections_by_name = {}
    for name, values in sections.items():
        if name not in SECTIONS:
            raise UsageError(f"section '{name}' of a recipe is unknown{nearest(name, SECTIONS)}")
        if not isinstance(values, Mapping):
            raise UsageError(f"section '{name}' of a recipe is no object of keys")
        sections_by_name[name] = _section(name, values)
    recipe = Recipe(**sections_by_name)
    _check(recipe)
    return recipe


def _sections(name: str) -> dict[str, Any]:
    path = Path(name)
    if not path.is_file():
        if path.suffix or len(path.parts) > 1:
            raise UsageError(f"there is no recipe '{name}'", f"shipped: {', '.join(names())}")
        if name not in names():
            raise UsageError(f"recipe '{name}' is unknown{nearest(name, names())}")
        path = SHIPPED / f"{name}.json"
    try:
        sections = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"the recipe {path} cannot be read: {error}") from error
    if not isinstance(sections, dict):
        raise UsageError(f"the recipe {path} is no object of sections")
    return sections


def _setting(text: str) -> tuple[str, str, Any]:
    place, equals, value = text.partition("=")
    section, dot, key = place.partition(".")
    if not (equals and dot and section and key):
        raise UsageError(f"--set has '{text}'", "write SECTION.KEY=VALUE, as train.steps=500")
    try:
        return section, key, json.loads(value)
    except ValueError:
        return section, key, value


def _section(name: str, values: Mapping[str, Any]) -> Any:
    kind = SECTIONS[name]
    fields = {entry.name: entry for entry in dataclasses.fields(kind)}
    plain = {}
    for key, value in values.items():
        if key not in fields:
            raise UsageError(f"key '{key}' of a recipe's '{name}' is unknown{nearest(key, fields)}")
        plain[key] = _value(name, fields[key], value)
    return kind(**plain)


def _value(section: str, entry: Any, value: Any) -> Any:
    place = f"{section}.{entry.name}"
    if value is None and "None" in str(entry.type):
        return None
    if known := CHOICES.get((section, entry.name)):
        if value not in known:
            raise UsageError(f"{place} '{value}' is unknown{nearest(str(value), known)}")
        return value
    if "tuple" in str(entry.type):
        if not isinstance(value, (list, tuple)) or not all(_is_whole(item) for item in value):
            raise UsageError(f"{place} is {value!r}", "give a list of whole numbers")
        return tuple(value)
    whole = str(entry.type).startswith("int")
    if not (_is_whole(value) if whole else _is_number(value)) or value < 0:
        what = "a whole number" if whole else "a number"
        raise UsageError(f"{place} is {value!r}", f"give {what} that is not negative")
    if (section, entry.name) in SHARES and value > 1:
        raise UsageError(f"{place} is {value!r}", "give a share from 0 to 1")
    return value if whole else float(value)


def _check(recipe: Recipe) -> None:
    prune, train = recipe.prune, recipe.train
    if prune is not None and prune.pattern == "2:4" and prune.sparsity != 0.5:
        raise UsageError(
            f"prune.sparsity {prune.sparsity:g} is not that of pattern 2:4, which is 0.5",
            "give 0.5, or another pattern",
        )
    if prune is not None and not 0 < prune.sparsity < 1:
        raise UsageError(f"prune.sparsity {prune.sparsity:g} is not between 0 and 1")
    if prune is not None and prune.method in TRAINED and not recipe.trains:
        raise UsageError(
            f"prune.method '{prune.method}' needs training, and train.steps is 0",
            "choose one-shot or second-order",
        )
    if prune is not None and prune.begin > prune.end:
        raise UsageError(f"prune.begin {prune.begin:g} lies behind prune.end {prune.end:g}")
    if recipe.depth is not None and (recipe.depth.layers is None) == (recipe.depth.keep is None):
        raise UsageError("depth needs the number of layers, or which to keep", "give one of both")
    if recipe.storage is not None and recipe.storage.clusters < 2:
        raise UsageError(f"storage.clusters is {recipe.storage.clusters}", "give at least 2")
    if not (train.batch and train.longest and train.save_every):
        raise UsageError("train.batch, train.longest and train.save_every are at least 1")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
