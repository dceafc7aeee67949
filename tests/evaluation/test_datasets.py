"""Files to evaluate with: what they may be, and what a bundle answers to them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import tiny_encoder

import bertile
from bertile.base.errors import InputError, UsageError
from bertile.evaluation import datasets
from bertile.evaluation.datasets import Dataset, output_of, read

LABELLED = (("a text", "good"), ("one, with a comma", "bad"), ("a\ttab", "good"))


def test_tsv_has_the_label_behind_the_last_tab(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_text("".join(f"{text}\t{label}\n" for text, label in LABELLED) + "\n")
    dataset = read(path)
    assert list(zip(dataset.texts, dataset.labels)) == list(LABELLED)


def test_jsonl_has_text_and_label(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a", "label": 1}\n' * 3)
    assert read(path) == Dataset(path, ("a",) * 3, ("1",) * 3)


def test_txt_has_sentences(tmp_path):
    (tmp_path / "x.txt").write_text("One.\n\nTwo.\nThree.\n")
    dataset = read(tmp_path / "x.txt")
    assert dataset.texts == ("One.", "Two.", "Three.") and dataset.labels is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", "a,b", "is not a file to evaluate with"),
        ("x.tsv", "a\tb\nno label\n", "line 2 of '.*' is not: text, a tab, a label"),
        ("x.tsv", "a\t\n", "line 1"),
        ("x.jsonl", '{"text": "a"}\n', "line 1 of"),
        ("x.jsonl", '{"text": 3, "label": "a"}\n', "line 1 of"),
        ("x.jsonl", "[1]\n", "line 1 of"),
        ("x.txt", "One.\nTwo.\n", "has 2 texts; give at least three"),
        ("absent.txt", None, "there is no file"),
    ],
)
def test_other_files_are_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=message):
        read(tmp_path / name)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="is not UTF-8 text"):
        read(tmp_path / "x.txt")


def test_labels_are_scored_by_accuracy():
    dataset = Dataset(Path("x.tsv"), ("a", "b", "c", "d"), ("no", "yes", "no", "no"))
    answers = np.array([[2, 1], [0, 3], [0, 1], [9, 0]], "float32")
    reference = np.array([[2, 1], [3, 0], [0, 1], [9, 0]], "float32")
    metrics = dataset.metrics(answers, reference, ("no", "yes"))
    assert metrics == {"accuracy": 0.75, "agreement": 0.75}
    assert dataset.score(answers, reference, ("no", "yes")) == 0.75


def test_label_that_the_model_does_not_know_is_an_error():
    dataset = Dataset(Path("x.tsv"), ("a",), ("maybe",))
    with pytest.raises(InputError, match=r"has the label 'maybe'.*known: no, yes"):
        dataset.metrics(np.zeros((1, 2)), np.zeros((1, 2)), ("no", "yes"))


def test_sentences_are_scored_by_the_lower_of_two_metrics():
    dataset = Dataset(Path("x.txt"), ("a", "b", "c", "d"))
    reference = np.random.default_rng(0).standard_normal((4, 8))
    far = reference + 5  # a common offset changes angles
    metrics = dataset.metrics(far, reference, ())
    assert set(metrics) == {"cosine", "spearman"}
    assert dataset.score(far, reference, ()) == min(metrics.values()) < 0.9
    assert dataset.score(reference, reference, ()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("head", "labelled", "message"),
    [
        ("embedding", True, r"with sentences \(.txt\)"),
        ("sequence-classification", False, r"with labelled texts \(.tsv, .jsonl\)"),
        ("encoder", False, "compile it with --head embedding"),
    ],
)
def test_file_must_fit_the_head(head, labelled, message):
    with pytest.raises(InputError, match=message):
        output_of(head, Dataset(Path("x"), ("a",), ("b",) if labelled else None))


def test_answers_of_a_bundle_are_one_vector_a_text(tmp_path, stages):
    directory = tiny_encoder.compile(tmp_path / "tiny", stages)
    texts = ("good movie", "bad bad movie, which is longer than the first", "movie")
    vectors = datasets.answers(directory, Dataset(Path("x.txt"), texts))
    with bertile.open(directory) as model:
        want = model.encode(texts[1])
    assert vectors.shape == (3, 128)
    np.testing.assert_allclose(vectors[1], want, atol=1e-5)
