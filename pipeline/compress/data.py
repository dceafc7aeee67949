"""Reads examples to train on: files of many forms, `datasets` directories, and two sources that
need no file.

`debian` is the package index of this machine: the section of a package from its description.
`docstrings` are texts of Python's standard library, without labels.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bertile.base.errors import UsageError, require
from bertile.compress import sections
from bertile.evaluation.paragraphs import paragraphs

# What columns may be called, the first that is there. {task: {field: names}}
FIRST = ("text", "sentence", "sentence1", "text_a", "premise", "review", "question1")
SECOND = ("text_pair", "sentence2", "text_b", "hypothesis", "question2")
LABEL = ("label", "labels", "label_text", "section", "class")
WORDS, TAGS = ("tokens", "words"), ("tags", "ner_tags", "labels", "pos_tags", "label")
QUESTION, CONTEXT, ANSWERS = ("question",), ("context",), ("answers", "answer")
DEBIAN, DOCSTRINGS = "debian", "docstrings"
DOCSTRING_COUNT = 2000
HELD_OUT = 10  # one text of so many is evaluated on, where no file says which


@dataclass(frozen=True)
class Example:
    """A text or two, or the words of one, with what it is labelled with.

    `label` is a name for a text or a pair, a name for each word, or the answers to a question as
    (text, first character); None where nobody has labelled it.
    """

    texts: tuple[str, ...]
    label: Any = None


Examples = tuple[Example, ...]


@dataclass(frozen=True)
class Split:
    """What is trained on, and what is evaluated on; `unlabelled` are more texts for a teacher."""

    train: Examples
    test: Examples
    unlabelled: Examples = ()


def read(
    task: str, data: str, evaluate: str | None = None, unlabelled: Sequence[str] = ()
) -> Split:
    """The examples of a task in `data`: a file, a directory of `datasets`, DEBIAN or DOCSTRINGS.

    Without `evaluate`, every tenth by a hash of its texts is held out. A text that is evaluated on
    is never trained on, wherever it comes from. Raises UsageError for what cannot be read, or is
    not of the task.
    """
    if data == DEBIAN and task == "text" and evaluate is None:
        split = sections.split()
        train, test = (_labelled(part) for part in (split.train, split.test))
    elif evaluate is not None:
        train, test = _source(task, data), _source(task, evaluate)
    else:
        every = _source(task, data)
        test = tuple(example for example in every if _place(example) % HELD_OUT == 0)
        train = tuple(example for example in every if _place(example) % HELD_OUT)
    seen = {example.texts for example in test}
    more = [example for name in unlabelled for example in _source("unlabelled", name)]
    train = tuple(example for example in train if example.texts not in seen)
    known = seen | {example.texts for example in train}
    rest = dict.fromkeys(Example(e.texts) for e in more if e.texts not in known)
    if not train or not test:
        raise UsageError(
            f"'{data}' leaves {len(train)} examples to train on and {len(test)} to evaluate on",
            "give more examples, or others with --eval",
        )
    return Split(train, test, tuple(rest))


def labels_of(examples: Iterable[Example]) -> tuple[str, ...]:
    """All labels of texts or of words, in the order of the alphabet."""
    names: set[str] = set()
    for example in examples:
        if isinstance(example.label, str):
            names.add(example.label)
        elif example.label is not None:
            names.update(example.label)
    return tuple(sorted(names))


def fingerprint(split: Split) -> str:
    """A hash of all examples, in their order."""
    digest = hashlib.sha256()
    for part in (split.train, split.test, split.unlabelled):
        for example in part:
            digest.update(repr((example.texts, example.label)).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def _source(task: str, name: str) -> Examples:
    if name == DEBIAN:
        pairs = sections.descriptions(sections.package_index())
        return _labelled(dict(pairs).items())
    if name == DOCSTRINGS:
        return tuple(Example((text,)) for text in paragraphs(DOCSTRING_COUNT))
    path = Path(name)
    if not path.exists():
        raise UsageError(f"there is no data '{name}'", f"give a file, {DEBIAN} or {DOCSTRINGS}")
    rows = _directory(path) if path.is_dir() else _rows(path)
    examples = []
    for number, row in enumerate(rows, 1):
        try:
            example = MAKERS[task](row)
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"row {number} of '{name}' is no example of '{task}': {error}"
            ) from error
        examples.append(example)
    if not examples:
        raise UsageError(f"'{name}' has no examples")
    return tuple(examples)


def _labelled(pairs: Iterable[tuple[str, str]]) -> Examples:
    return tuple(Example((text,), label) for text, label in pairs)


def _place(example: Example) -> int:
    return int(hashlib.sha256("\0".join(example.texts).encode()).hexdigest()[:8], 16)


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    if path.suffix not in READERS:
        raise UsageError(
            f"'{path}' is no file of examples",
            f"give one of {', '.join(READERS)}, or a directory that datasets has saved",
        )
    try:
        with path.open(encoding="utf-8", newline="") as file:
            yield from READERS[path.suffix](file)
    except UnicodeDecodeError as error:
        raise UsageError(f"'{path}' is not UTF-8 text: {error.reason}") from error
    except (json.JSONDecodeError, csv.Error) as error:
        raise UsageError(f"'{path}' cannot be read: {error}") from error


def _directory(path: Path) -> Iterator[Mapping[str, Any]]:
    """What `datasets` has saved; integers that stand for names are named."""
    (datasets,) = require("train", "datasets")
    try:
        held = datasets.load_from_disk(str(path))
    except Exception as error:  # of arrow, of JSON, of the file system
        raise UsageError(f"'{path}' is no directory that datasets has saved: {error}") from error
    if isinstance(held, datasets.DatasetDict):
        name = "train" if "train" in held else next(iter(held))
        held = held[name]
    named = {
        column: getattr(kind, "feature", kind)
        for column, kind in held.features.items()
        if hasattr(getattr(kind, "feature", kind), "int2str")
    }
    for row in held:
        for column, kind in named.items():
            value = row[column]
            row[column] = kind.int2str(value) if value is not None else None
        yield row


def _tsv(file: Any) -> Iterator[dict[str, Any]]:
    """With a line of names, or without: a text, a tab, a label."""
    lines = [line.rstrip("\r\n") for line in file if line.strip()]
    header = lines[0].split("\t") if lines else []
    if {*header} & {*FIRST, *WORDS, *QUESTION}:
        yield from (dict(zip(header, line.split("\t"))) for line in lines[1:])
        return
    for line in lines:
        *texts, label = line.split("\t")
        yield dict(zip(("text", "text_pair"), texts)) | {"label": label}


def _json(file: Any) -> Iterator[dict[str, Any]]:
    """A list of objects, or SQuAD's paragraphs."""
    content = json.load(file)
    if isinstance(content, list):
        yield from content
        return
    for article in content["data"]:
        if "paragraphs" not in article:
            yield article
            continue
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                yield {"context": paragraph["context"], **question}


READERS: dict[str, Callable[[Any], Iterator[Mapping[str, Any]]]] = {
    ".csv": csv.DictReader,
    ".tsv": _tsv,
    ".jsonl": lambda file: (json.loads(line) for line in file if line.strip()),
    ".json": _json,
    ".txt": lambda file: ({"text": line.strip()} for line in file if line.strip()),
}


def _of(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise KeyError(f"it has no {names[0]} among {', '.join(map(str, row))}")


def _string(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{value!r} is no text")
    return value


def _text(row: Mapping[str, Any]) -> Example:
    return Example((_string(_of(row, FIRST)),), str(_of(row, LABEL)))


def _pair(row: Mapping[str, Any]) -> Example:
    return Example((_string(_of(row, FIRST)), _string(_of(row, SECOND))), str(_of(row, LABEL)))


def _words(row: Mapping[str, Any]) -> Example:
    words, tags = _of(row, WORDS), _of(row, TAGS)
    if isinstance(words, str):  # of CSV
        words, tags = words.split(), str(tags).split()
    if len(words) != len(tags):
        raise ValueError(f"{len(words)} words have {len(tags)} tags")
    return Example(tuple(map(str, words)), tuple(map(str, tags)))


def _question(row: Mapping[str, Any]) -> Example:
    answers = _of(row, ANSWERS)
    if isinstance(answers, Mapping):  # of `datasets`
        pairs = zip(answers["text"], answers["answer_start"])
    else:
        pairs = ((answer["text"], answer["answer_start"]) for answer in answers)
    held = tuple((str(text), int(start)) for text, start in pairs)
    return Example((_string(_of(row, QUESTION)), _string(_of(row, CONTEXT))), held)


def _unlabelled(row: Mapping[str, Any]) -> Example:
    return Example((_string(_of(row, FIRST)),))


MAKERS: dict[str, Callable[[Mapping[str, Any]], Example]] = {
    "text": _text,
    "pair": _pair,
    "tokens": _words,
    "answers": _question,
    "embedding": _unlabelled,
    "unlabelled": _unlabelled,
}
