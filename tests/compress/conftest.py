"""Makes a tiny classifier, untrained and trained, once for all tests of training."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import text_models, tiny_training


@pytest.fixture(scope="session")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of 32 channels with random weights, and a tokenizer."""
    directory = tmp_path_factory.mktemp("untrained") / "model"
    return text_models.save(
        directory, "SequenceClassification", labels=tiny_training.LABELS, initializer_range=0.1
    )


@pytest.fixture(scope="session")
def teacher(untrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, fine-tuned until it knows its labels."""
    directory = tmp_path_factory.mktemp("teacher")
    report = tiny_training.compress(directory, untrained, ("finetune",), "train.steps=60")
    assert report["score"] > 0.9
    return directory / "out"
