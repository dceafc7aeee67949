"""Sentences: always the same ones, varied, and sentences."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bertile.evaluation.sentences import first_sentence, sentences


@pytest.fixture(scope="module")
def found() -> list[str]:
    return sentences()


def test_there_are_500_different_ones(found):
    assert len(found) == len(set(found)) == 500


def test_they_are_sentences_of_5_to_40_words(found):
    assert all(5 <= len(one.split()) <= 40 for one in found)
    assert all(one[0].isupper() and one[-1] in ".!?" for one in found)


def test_few_begin_alike(found):
    assert len({one.split()[0] for one in found}) > 100


def test_they_are_the_same_in_every_process(found, tmp_path):
    command = [sys.executable, "-m", "bertile.evaluation.sentences", "-o", tmp_path / "s.txt"]
    subprocess.run(command, check=True)
    assert (tmp_path / "s.txt").read_text().splitlines() == found


def test_fewer_are_the_first_of_them(found):
    assert sentences(64) == found[:64]


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
