"""Fine-tuning: a few examples are learned, and what is written compiles with its labels."""

from __future__ import annotations

from pathlib import Path

import pytest

import bertile
from bertile.base.progress import Progress
from bertile.compress.sections import Split
from bertile.compress.train import train
from bertile.config import Config
from bertile.evaluation import datasets

EXAMPLES = tuple(
    (f"{words} number {index}", label)
    for index in range(32)
    for words, label in (("game of dragons", "games"), ("library of sums", "maths"))
)


@pytest.mark.slow
def test_what_is_trained_compiles_and_keeps_its_accuracy(tmp_path: Path, cache: str):
    split = Split(EXAMPLES, EXAMPLES[::7])
    score = train(tmp_path / "model", split, Progress(-1), epochs=4)
    assert score == 1.0
    dataset = datasets.read(tmp_path / "model" / "test.tsv")
    assert list(zip(dataset.texts, dataset.labels)) == list(split.test)
    config = Config(precision="int8", cache_dir=cache)
    bertile.compile(tmp_path / "model", tmp_path / "bundle", config)
    answers = datasets.answers(tmp_path / "bundle", dataset)
    assert dataset.score(answers, answers, ("games", "maths")) == 1.0
