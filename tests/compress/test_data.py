"""Examples from files of every form, and from `datasets` directories: what each row becomes."""

from __future__ import annotations

import json
import re

import pytest

from bertile.compress import data, sections
from bertile.compress.data import Example
from bertile.errors import UsageError

SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": "A cat sat on a mat.",
                    "qas": [
                        {"question": "Who sat?", "answers": [{"text": "cat", "answer_start": 2}]},
                        {"question": "Why?", "answers": []},
                    ],
                }
            ]
        }
    ]
}
FILES = {
    "csv": ("text", "a.csv", 'label,text\nbad,"one, two"\n', Example(("one, two",), "bad")),
    "tsv": ("text", "a.tsv", "one two\tbad\n", Example(("one two",), "bad")),
    "tsv with names": ("text", "a.tsv", "label\tsentence\n0\tone\n", Example(("one",), "0")),
    "tsv of pairs": ("pair", "a.tsv", "one\ttwo\tsame\n", Example(("one", "two"), "same")),
    "jsonl": ("text", "a.jsonl", '{"review": "one", "label": 1}\n\n', Example(("one",), "1")),
    "pair": (
        "pair",
        "a.jsonl",
        '{"premise": "one", "hypothesis": "two", "label": "entailment"}\n',
        Example(("one", "two"), "entailment"),
    ),
    "words": (
        "tokens",
        "a.jsonl",
        '{"tokens": ["in", "paris"], "tags": ["O", "LOC"]}\n',
        Example(("in", "paris"), ("O", "LOC")),
    ),
    "words of csv": ("tokens", "a.csv", "words,tags\nin paris,O LOC\n", None),
    "txt": ("embedding", "a.txt", "one two\n\n", Example(("one two",))),
    "squad": (
        "answers",
        "a.json",
        json.dumps(SQUAD),
        Example(("Who sat?", "A cat sat on a mat."), (("cat", 2),)),
    ),
}


@pytest.mark.parametrize(("task", "name", "text", "wanted"), FILES.values(), ids=FILES)
def test_files_of_each_form(tmp_path, task, name, text, wanted):
    path, other = tmp_path / name, tmp_path / f"other{name}"
    path.write_text(text)
    other.write_text(text.replace("one", "three").replace("in ", "on ").replace("Who", "What"))
    other.write_text(other.read_text().replace('"in"', '"on"').replace("Why", "How"))
    split = data.read(task, str(other), str(path))
    assert split.test[0] == (wanted or Example(("in", "paris"), ("O", "LOC")))
    assert split.train[0] != split.test[0]


def test_saved_datasets_have_their_labels_by_name(tmp_path):
    datasets = pytest.importorskip("datasets", reason="which is what has saved them")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    rows = {"text": [f"text {n}" for n in range(40)], "label": [n % 2 for n in range(40)]}
    held = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": held}).save_to_disk(str(tmp_path / "saved"))
    split = data.read("text", str(tmp_path / "saved"))
    assert {*split.train, *split.test} == {
        Example((f"text {n}",), ("bad", "good")[n % 2]) for n in range(40)
    }
    assert split.test and not {e.texts for e in split.train} & {e.texts for e in split.test}


def test_what_is_evaluated_on_is_never_trained_on(tmp_path):
    (tmp_path / "a.tsv").write_text("one\tx\ntwo\ty\nthree\tx\n")
    (tmp_path / "b.tsv").write_text("two\ty\n")
    (tmp_path / "c.txt").write_text("two\nthree\nfour\nfour\n")
    split = data.read(
        "text", str(tmp_path / "a.tsv"), str(tmp_path / "b.tsv"), [str(tmp_path / "c.txt")]
    )
    assert [e.texts[0] for e in split.train] == ["one", "three"]
    assert split.unlabelled == (Example(("four",)),)
    assert data.labels_of((*split.train, *split.test)) == ("x", "y")


def test_debian_has_its_own_split_and_unlabelled_texts(monkeypatch):
    index = "\n\n".join(
        f"Package: p{s}-{n}\nSection: s{s}\nDescription: text {n} of {s}"
        for s in range(12)
        for n in range(600 + s)
    )
    monkeypatch.setattr(sections, "package_index", lambda: index)
    split = data.read("text", "debian", None, ["debian"])
    assert (len(split.train), len(split.test)) == (4000, 2000)
    everything = 12 * 600 + sum(range(12))
    assert len(split.unlabelled) == everything - 6000
    assert {example.label for example in split.unlabelled} == {None}
    assert len(data.labels_of(split.train)) == 10


def test_docstrings_need_no_file(monkeypatch):
    monkeypatch.setattr(data, "DOCSTRING_COUNT", 100)
    split = data.read("embedding", "docstrings")
    assert len(split.train) + len(split.test) == data.DOCSTRING_COUNT
    assert len(split.test) == pytest.approx(data.DOCSTRING_COUNT / data.HELD_OUT, rel=0.6)
    assert data.fingerprint(split) == data.fingerprint(data.read("embedding", "docstrings"))


MISTAKES = {
    "no file": ("text", "none.tsv", None, "there is no data"),
    "kind": ("text", "a.pdf", "x", "is no file of examples"),
    "label": ("text", "a.txt", "one\ntwo\n", "row 1 of .* is no example of 'text'"),
    "tags": ("tokens", "a.jsonl", '{"tokens": ["a", "b"], "tags": ["O"]}\n', "2 words have 1 tags"),
    "json": ("text", "a.jsonl", "{\n", "cannot be read"),
    "empty": ("text", "a.tsv", "", "has no examples"),
    "too few": ("text", "a.tsv", "one\tx\n", "examples to train on"),
    "no text": ("text", "a.jsonl", '{"text": "", "label": 1}\n', "is no text"),
}


@pytest.mark.parametrize(("task", "name", "text", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(tmp_path, task, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UsageError) as error:
        data.read(task, str(tmp_path / name))
    assert re.search(message, str(error.value))


def test_directory_that_datasets_has_not_saved_is_refused(tmp_path):
    pytest.importorskip("datasets", reason="which is what reads them")
    with pytest.raises(UsageError, match="is no directory that datasets has saved"):
        data.read("text", str(tmp_path))
