"""Says what answers are worth: accuracy by labels, else how like a reference's they are, with the
interval of a bootstrap.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bertile import loader
from bertile.bench.engines import Arrays
from bertile.evaluation import datasets, metrics
from bertile.evaluation.datasets import Dataset
from bertile.families import text_settings
from bertile.text.tokens import FIELDS, TextTokenizer, max_tokens

RESAMPLES, CONFIDENCE, SEED = 2000, 0.95, 20


class Answers(NamedTuple):
    """What an engine answers to texts, (texts, channels), and through how many encoder layers each
    went, (texts,), None where all go through the same.
    """

    outputs: np.ndarray
    layers: np.ndarray | None


def answers_of(worker: Any, bundle: Path, dataset: Dataset) -> Answers:
    """An engine's answers to each text by itself."""
    manifest = loader.read_manifest(bundle)
    output = datasets.output_of(manifest["model"]["head"], dataset)
    place = [spec["name"] for spec in manifest["outputs"]].index(output)
    settings = text_settings.of_bundle(bundle, manifest)
    tokenizer = TextTokenizer(bundle, settings, max_tokens(manifest))
    names = [spec["name"] for spec in manifest["inputs"] if spec["name"] in FIELDS]
    rows, layers = [], []
    leaves = "exits" in manifest
    for encoding in tokenizer.encode(dataset.texts):
        arrays: Arrays = {
            name: np.array([getattr(encoding, FIELDS[name])], np.int64) for name in names
        }
        outputs = worker.outputs(arrays)
        rows.append(outputs[place][0])
        if leaves:
            layers.append(outputs[-1][0])
    return Answers(np.stack(rows), np.array(layers) if leaves else None)


def score(
    answers: np.ndarray, dataset: Dataset, bundle: Path, wanted: np.ndarray | None
) -> dict[str, float]:
    """ "score" with the ends of its interval, "low" and "high"."""
    if wanted is not None:
        score = metrics.similarity_spearman(answers, wanted)
        low, high = _bootstrap_of_pairs(answers, wanted)
        return {"score": score, "low": low, "high": high}
    names = loader.read_manifest(bundle)["model"]["labels"]
    right = np.array(
        [names[best] == label for best, label in zip(answers.argmax(1), dataset.labels)], float
    )
    low, high = bootstrap(right)
    return {"score": float(right.mean()), "low": low, "high": high}


def bootstrap(right: np.ndarray, resamples: int = RESAMPLES) -> tuple[float, float]:
    """The ends of the interval that holds the mean of (texts,) with 95% confidence.

    Efron 1979: means of as many texts, drawn again and again from these.
    """
    chance = np.random.default_rng(SEED)
    draws = chance.integers(0, len(right), (resamples, len(right)))
    means = right[draws].mean(1)
    tail = (1 - CONFIDENCE) / 2
    return float(np.quantile(means, tail)), float(np.quantile(means, 1 - tail))


def left_at(layers: np.ndarray | None, exits: Mapping[str, Any] | None) -> np.ndarray:
    """The share of the texts that left at each stage."""
    if layers is None or exits is None:
        return np.ones(1)
    return np.array([float((layers == count).mean()) for count in exits["layers"]])


def in_words(left: np.ndarray, exits: Mapping[str, Any] | None) -> str:
    """The same in a table; "" of a model whose texts leave at its end."""
    if exits is None:
        return ""
    return ", ".join(f"layer {n}: {share:.1%}" for n, share in zip(exits["layers"], left))


def _bootstrap_of_pairs(answers: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """The same of a correlation over pairs, of texts that are drawn again; a tenth of the draws,
    since each sorts all pairs.
    """
    chance = np.random.default_rng(SEED)
    scores = []
    for _ in range(RESAMPLES // 10):
        drawn = np.unique(chance.integers(0, len(answers), len(answers)))
        scores.append(metrics.similarity_spearman(answers[drawn], wanted[drawn]))
    tail = (1 - CONFIDENCE) / 2
    return float(np.quantile(scores, tail)), float(np.quantile(scores, 1 - tail))
