"""Paragraphs: always the same ones, different, of mixed length."""

from __future__ import annotations

from pathlib import Path

import pytest

from bertile.base.errors import BertileError
from bertile.evaluation import sentences
from bertile.evaluation.paragraphs import first_paragraphs, paragraphs


def test_they_are_different_of_3_to_200_words_and_always_the_same() -> None:
    texts = paragraphs(300)
    assert len(set(texts)) == 300 and texts == paragraphs(300)
    counts = sorted(len(text.split()) for text in texts)
    assert counts[0] >= 3 and counts[-1] <= 200
    assert counts[150] < 40 and counts[-15] > 80  # most are short, some are long


def test_too_many_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.py").write_text('"""Two words."""\ndef f():\n    """Give back the sum."""\n')
    monkeypatch.setattr(sentences, "library_files", lambda: (tmp_path, [tmp_path / "a.py"]))
    assert paragraphs(1) == ["Give back the sum."]
    with pytest.raises(BertileError, match="has 1 docstrings for this, 2 are wanted"):
        paragraphs(2)


@pytest.mark.parametrize(
    ("docstring", "text"),
    [
        ("A first line,\n  and a second.\n\nMore.", "A first line, and a second. More."),
        ("Three words here.\n\n" + "word " * 198, "Three words here."),
        ("Three words here.\n \n" + "word " * 197, "Three words here." + " word" * 197),
        ("Two words.", None),
        ("word " * 201, None),
        ("", None),
    ],
)
def test_whole_paragraphs_up_to_200_words(docstring: str, text: str | None) -> None:
    assert first_paragraphs(docstring) == text
