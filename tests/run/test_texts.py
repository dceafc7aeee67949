"""Texts in, results out: batches, limits, and answers per head, on a model that only counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bertile import loader
from bertile.base.errors import BundleError, InputError
from bertile.run import texts

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b")


class Model:
    """Stands in for a bundle: outputs that tell which text they came from."""

    inputs = ("input_ids", "attention_mask")

    def __init__(self, head: str, labels: tuple[str, ...] = (), max_length: int | None = 8):
        self.manifest = {
            "model": {"head": head, "labels": list(labels), "max_length": max_length},
            "static": {"batch": None, "length": None},
        }
        self.shapes: list[tuple[int, int]] = []

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> dict[str, Any]:
        self.shapes.append(input_ids.shape)
        assert ((input_ids > 0) == (attention_mask > 0)).all()
        counts = np.stack([(input_ids == word).sum(1) for word in (4, 5)], axis=1)
        head = self.manifest["model"]["head"]
        if head == "embedding":
            return {"sentence_embedding": counts.astype(np.float32)}
        if head == "token-classification":
            return {"logits": np.stack([input_ids == 4, input_ids == 5], -1).astype(np.float32)}
        return {"logits": counts[:, : len(self.manifest["model"]["labels"])].astype(np.float32)}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A directory with a tokenizer of words, which would pad and cut if it were asked."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    def use(model: Model) -> Model:
        monkeypatch.setattr(loader, "load", lambda directory, threads: model)
        return model

    return use


def test_embeddings_come_in_the_order_of_the_texts(bundle: Path, load) -> None:
    model = load(Model("embedding"))
    result = texts.run(bundle, ["a a a a a", "b", "a", "a b"])
    assert result["embeddings"] == [[5, 0], [0, 1], [1, 0], [1, 1]]
    assert result["tokens"] == [7, 3, 3, 4]
    assert np.allclose(np.diag(result["cosine"]), 1)
    assert result["cosine"][0] == pytest.approx([1, 0, 1, 0.5**0.5])
    assert model.shapes == [(4, 7)]


def test_long_lists_run_in_batches_of_similar_length(
    bundle: Path, load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "BATCH", 2)
    model = load(Model("embedding"))
    result = texts.run(bundle, ["a a a a", "b", "a a a", "a"])
    assert model.shapes == [(2, 3), (2, 6)]
    assert [row[0] for row in result["embeddings"]] == [4, 0, 3, 1]


def test_classification_gives_label_and_probability(bundle: Path, load) -> None:
    load(Model("sequence-classification", ("good", "bad")))
    result = texts.run(bundle, ["a a", "b"])
    assert [answer["label"] for answer in result["labels"]] == ["good", "bad"]
    assert result["labels"][0]["score"] == pytest.approx(1 / (1 + np.exp(-2)))
    assert "good" in texts.as_text(result)


def test_regression_gives_its_number(bundle: Path, load) -> None:
    load(Model("sequence-classification", ("stars",)))
    assert texts.run(bundle, ["a a"])["labels"] == [{"label": "stars", "score": 2.0}]


def test_token_classification_leaves_special_tokens_out(bundle: Path, load) -> None:
    load(Model("token-classification", ("A", "B")))
    (row,) = texts.run(bundle, ["a b"])["labels"]
    assert [(answer["token"], answer["label"]) for answer in row] == [("a", "A"), ("b", "B")]


def test_text_that_is_too_long_is_refused_with_both_numbers(bundle: Path, load) -> None:
    load(Model("embedding"))
    with pytest.raises(InputError, match="text 2 has 9 tokens, the model takes at most 8"):
        texts.run(bundle, ["a", "a a a a a a a"])


def test_truncate_cuts_a_text_that_is_too_long(bundle: Path, load) -> None:
    load(Model("embedding"))
    assert texts.run(bundle, ["a a a a a a a"], truncate=True)["embeddings"] == [[6, 0]]


def test_head_without_an_answer_to_a_text_is_refused(bundle: Path, load) -> None:
    load(Model("masked-lm"))
    with pytest.raises(InputError, match="has the head 'masked-lm'"):
        texts.run(bundle, ["a"])


def test_missing_tokenizer_is_named(tmp_path: Path, load) -> None:
    load(Model("embedding"))
    with pytest.raises(BundleError, match=r"has no tokenizer\.json"):
        texts.run(tmp_path, ["a"])
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": 1}))
    with pytest.raises(BundleError, match="cannot be read"):
        texts.run(tmp_path, ["a"])


def test_max_tokens_is_the_lower_of_both_limits() -> None:
    manifest = {"model": {"max_length": 512}, "static": {"length": 128}}
    assert texts.max_tokens(manifest) == 128
    assert texts.max_tokens({"model": {"max_length": None}, "static": {}}) is None


def test_text_table_shows_similarities(bundle: Path, load) -> None:
    load(Model("embedding"))
    text = texts.as_text(texts.run(bundle, ["a", f"{'b ' * 3}{'c' * 100}"]))
    assert "[2]" in text and "..." in text
