"""Makes what a tiny model learns in a second: texts whose label is a word that stands in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from helpers import text_models

from bertile.compress import compressor, recipe

LABELS = ("bad", "good")
QUICK = ("train.steps=30", "train.rate=0.003", "train.batch=16", "train.dropout=0")


def texts(count: int = 160, seed: int = 0) -> list[tuple[str, str]]:
    """Texts of 3 to 12 words with their labels."""
    chance = np.random.default_rng(seed)
    others = [word for word in text_models.WORDS[:40] if word not in LABELS]
    examples = []
    for number in range(count):
        label = LABELS[number % 2]
        words = list(chance.choice(others, chance.integers(2, 12)))
        words.insert(int(chance.integers(0, len(words) + 1)), label)
        examples.append((" ".join(words), label))
    return examples


def write(path: Path, count: int = 160, seed: int = 0) -> Path:
    """The same as .tsv."""
    path.write_text("".join(f"{text}\t{label}\n" for text, label in texts(count, seed)))
    return path


def compress(
    directory: Path, model: Path, recipes: tuple[str, ...], *settings: str, **choices: Any
) -> dict[str, Any]:
    """Run recipes on the texts; the result is in `directory`/out."""
    directory.mkdir(parents=True, exist_ok=True)
    data = write(directory / "texts.tsv")
    asked = recipe.read(recipes, (*QUICK, *settings))
    choices = {"task": "text", "dataset": str(data), **choices}
    with text_models.single_thread():
        return compressor.compress(str(model), directory / "out", asked, **choices)
