"""The package index: which texts it gives, and that the same ones are always tested with."""

from __future__ import annotations

import subprocess

import pytest

from bertile.base.errors import BertileError
from bertile.compress import sections
from bertile.compress.sections import descriptions, package_index, split

INDEX = """Package: 0ad
Version: 1.0: a
Section: contrib/games
Description: Game of  ancient warfare
 A longer text: left out.
Homepage: https://example.org

Package: one
Section: libs
Description-en: A library

Package: no-section
Description: Left out
"""


def index_of(count: int, names: int) -> str:
    return "\n\n".join(
        f"Package: p{section}-{number}\nSection: main/s{section}\n"
        f"Description: text {number} of {section}"
        for section in range(names)
        for number in range(count + section)
    )


def test_descriptions_are_the_short_ones_with_their_sections():
    assert list(descriptions(INDEX)) == [
        ("Game of ancient warfare", "games"),
        ("A library", "libs"),
    ]


def test_split_takes_as_many_of_each_of_the_ten_largest():
    chosen = split(index_of(600, 12))
    assert chosen.labels == sorted(f"s{index}" for index in range(2, 12))
    for part, count in ((chosen.train, 400), (chosen.test, 200)):
        assert [sum(label == section for _, label in part) for section in chosen.labels] == [
            count
        ] * 10
    assert not {text for text, _ in chosen.train} & {text for text, _ in chosen.test}


def test_newer_index_moves_hardly_an_example():
    old, new = split(index_of(700, 10)), split(index_of(710, 10))
    assert len(set(old.test) & set(new.test)) > 0.97 * len(old.test)


def test_order_mixes_the_sections():
    labels = [label for _, label in split(index_of(600, 10)).test]
    assert len(set(labels[:200])) == 10


def test_index_that_is_too_small_is_refused():
    with pytest.raises(BertileError, match=r"fewer than 600 packages in 10 sections; .*apt-get"):
        split(INDEX)


def test_machine_without_an_index_is_told_what_to_do(monkeypatch):
    monkeypatch.setattr(sections.shutil, "which", lambda name: None)
    with pytest.raises(BertileError, match="has no apt-cache"):
        package_index()
    monkeypatch.setattr(sections.shutil, "which", lambda name: "apt-cache")
    nothing = subprocess.CompletedProcess([], 0, "\n", "")
    monkeypatch.setattr(sections.subprocess, "run", lambda *_, **__: nothing)
    with pytest.raises(BertileError, match="apt-get update"):
        package_index()
