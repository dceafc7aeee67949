"""Sentences: always the same ones, varied, and sentences."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bertile.evaluation.sentences import first_sentence, sentences


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return sentences()


def test_there_are_500_different_ones(texts):
    assert len(texts) == len(set(texts)) == 500


def test_they_are_sentences_of_5_to_40_words(texts):
    assert all(5 <= len(text.split()) <= 40 for text in texts)
    assert all(text[0].isupper() and text[-1] in ".!?" for text in texts)


def test_few_begin_alike(texts):
    assert len({text.split()[0] for text in texts}) > 100


def test_they_are_the_same_in_every_process(texts, tmp_path):
    command = [sys.executable, "-m", "bertile.evaluation.sentences", "-o", tmp_path / "s.txt"]
    subprocess.run(command, check=True)
    assert (tmp_path / "s.txt").read_text().splitlines() == texts


def test_fewer_are_the_first_of_them(texts):
    assert sentences(64) == texts[:64]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Give back the sum.  And more.", None),  # four words
        ("Give back the sum of\n    two. And more.", "Give back the sum of two."),
        (
            "Take a word (e.g. this one) and say it. Or not.",
            "Take a word (e.g. this one) and say it.",
        ),
        ("lower case begins this one here.", None),
        ("Call f(x, y) -> z_1 + z_2 == 3 now.", None),
        ("No full stop is in this line", None),
        ("", None),
    ],
)
def test_first_sentence(text, wanted):
    assert first_sentence(text) == wanted
