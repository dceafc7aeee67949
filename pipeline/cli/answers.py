"""Asks a model of texts what a command line wants of it, and says how its answers are shown."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bertile.base.allowed import AGGREGATIONS
from bertile.base.errors import InputError, UsageError, nearest
from bertile.base.tables import Column, short
from bertile.cli.result_files import Form
from bertile.cli.text_files import Item
from bertile.text import Answerer, Classifier, Embedder, Featurizer, Filler, Tagger
from bertile.text.classifier import TEMPLATE
from bertile.text.text_model import TextModel

SHOWN = 4  # numbers of a vector that a table shows
BLOCK = 256  # rows of similarities that are computed at once

Rows = list[tuple[Any, ...]]


class Asked(NamedTuple):
    """What a command line asks for; None and False are what the model does. `pairs`: of texts that
    are pairs.
    """

    pairs: bool = False
    question: str | None = None
    top_k: int | None = None
    aggregation: str | None = None
    candidate_labels: str | None = None
    hypothesis_template: str | None = None
    multi_label: bool = False
    prompt_name: str | None = None
    prompt: str | None = None
    normalize: bool = False
    truncate_dim: int | None = None
    similarity: bool = False
    truncate: bool = True


class Answers(NamedTuple):
    """The answers to texts as they come, and how to show them.

    `record` makes of an answer what JSON says of it beside the text, `cells` the rows of a table
    with these `columns`, `array` what a file of the `form` holds.
    """

    stream: Generator[Any, None, None]
    record: Callable[[Any], dict[str, Any]]
    columns: Sequence[Column]
    cells: Callable[[Item, Any], Rows]
    form: Form
    array: Callable[[Any], Any] = lambda answer: answer
    names: tuple[str, str] = ("text", "text_pair")  # of a pair in JSON


def ask(model: TextModel, items: Iterable[Item], asked: Asked) -> Answers:
    """The model's answers to the items; UsageError for what this model cannot be asked."""
    kind = type(model)
    for flag, (value, kinds) in _flags(asked).items():
        if value not in (None, False) and kind not in kinds:
            raise UsageError(f"{flag} is not for a model with the head '{_head(model)}'")
    return _KINDS[kind](model, iter(items), asked)


def _flags(asked: Asked) -> dict[str, tuple[Any, tuple[type, ...]]]:
    """The flags that not every model knows: their values, and whose they are."""
    vectors = (Embedder,)
    return {
        "--question": (asked.question, (Answerer, Classifier)),
        "--top-k": (asked.top_k, (Answerer, Classifier, Filler)),
        "--candidate-labels": (asked.candidate_labels, (Classifier,)),
        "--hypothesis-template": (asked.hypothesis_template, (Classifier,)),
        "--multi-label": (asked.multi_label, (Classifier,)),
        "--aggregation": (asked.aggregation, (Tagger,)),
        "--prompt-name": (asked.prompt_name, vectors),
        "--prompt": (asked.prompt, vectors),
        "--normalize": (asked.normalize, vectors),
        "--truncate-dim": (asked.truncate_dim, vectors),
        "--similarity": (asked.similarity, vectors),
    }


def _head(model: TextModel) -> str:
    return model.model.manifest["model"]["head"]


def _single(items: Iterable[Item], model: TextModel) -> Iterator[str]:
    for number, item in enumerate(items, 1):
        if not isinstance(item, str):
            raise UsageError(
                f"text {number} is a pair; a model with the head '{_head(model)}' takes texts"
            )
        yield item


def _right(heading: str, width: int = 5) -> Column:
    return Column(heading, width, right=True)


_TEXT = Column("text", 0)  # the last of a table, since it needs no width


def _shown(item: Item) -> str:
    return item if isinstance(item, str) else " | ".join(map(short, item))


def _numbers(vector: np.ndarray) -> str:
    """The first numbers of a vector."""
    more = " ..." if len(vector) > SHOWN else ""
    return " ".join(f"{number:7.4f}" for number in vector[:SHOWN]) + more


# Vectors


def _embedded(model: Embedder, items: Iterator[Item], asked: Asked) -> Answers:
    vectors = model.encode_iter(
        _single(items, model),
        asked.prompt_name,
        asked.prompt,
        show_progress_bar=False,
        normalize_embeddings=asked.normalize,
        truncate_dim=asked.truncate_dim,
        truncate=asked.truncate,
    )
    if asked.similarity:
        return _similar(model, vectors)
    kind = model.settings.kind
    if kind == "sparse":
        return _sparse(model, vectors)
    if kind == "tokens":
        return _by_token(vectors, "embeddings")
    return Answers(
        vectors,
        lambda vector: {"embedding": vector},
        (Column("embedding", 35), _TEXT),
        lambda item, vector: [(_numbers(vector), _shown(item))],
        Form("rows", "embeddings"),
    )


def _sparse(model: Embedder, vectors: Iterator[Any]) -> Answers:
    def heaviest(vector: Any) -> str:
        return ", ".join(f"{token} {weight:.2f}" for token, weight in model.decode(vector, SHOWN))

    return Answers(
        vectors,
        lambda vector: {"indices": vector.indices, "values": vector.values},
        (_right("weights"), Column("heaviest", 45), _TEXT),
        lambda item, vector: [(len(vector.indices), heaviest(vector), _shown(item))],
        Form("sparse"),
    )


def _by_token(vectors: Iterator[np.ndarray], name: str) -> Answers:
    return Answers(
        vectors,
        lambda rows: {name: rows},
        (_right("tokens"), Column("the first", 35), _TEXT),
        lambda item, rows: [(len(rows), _numbers(rows[0]), _shown(item))],
        Form("tokens", name),
    )


def _similar(model: Embedder, vectors: Iterator[Any]) -> Answers:
    """How alike each text is to all of them."""
    everything = list(vectors)

    def rows() -> Iterator[np.ndarray]:
        for start in range(0, len(everything), BLOCK):
            yield from model.similarity(everything[start : start + BLOCK], everything)

    columns = [_right(f"[{number}]") for number in range(1, len(everything) + 1)]
    return Answers(
        rows(),
        lambda row: {model.similarity_fn_name: row},
        (*columns, _TEXT),
        lambda item, row: [(*row.tolist(), _shown(item))],
        Form("rows", "similarities"),
    )


def _featured(model: Featurizer, items: Iterator[Item], asked: Asked) -> Answers:
    texts = _single(items, model)
    return _by_token(model.features_iter(texts, truncate=asked.truncate), "features")


# Labels


def _classified(model: Classifier, items: Iterator[Item], asked: Asked) -> Answers:
    if asked.candidate_labels is not None:
        return _zero_shot(model, items, asked)
    for flag in ("--hypothesis-template", "--multi-label"):
        if _flags(asked)[flag][0]:
            raise UsageError(f"{flag} is for labels of yours", "give --candidate-labels")
    count = model.model.manifest["outputs"][0]["axes"][-1]
    labels = [*model.labels, *(f"LABEL_{index}" for index in range(len(model.labels), count))]
    # a pair's only score is what a reranker gives: CrossEncoder's, not that of a pipeline
    reranks = len(labels) == 1 and asked.pairs
    ranked = model.classify_iter(
        items,
        None,
        model.settings.activation if reranks else None,
        truncate=asked.truncate,
    )

    def record(answer: list[dict[str, Any]]) -> dict[str, Any]:
        if asked.top_k is not None:
            return {"labels": answer[: asked.top_k]}
        return {"score": answer[0]["score"]} if reranks else answer[0]

    def array(answer: list[dict[str, Any]]) -> np.ndarray:
        scores = {row["label"]: row["score"] for row in answer}
        return np.asarray([scores[label] for label in labels], np.float32)

    return Answers(
        ranked,
        record,
        (_right("score"), Column("label", max(map(len, labels))), _TEXT),
        lambda item, answer: [
            (row["score"], row["label"], _shown(item)) for row in answer[: asked.top_k or 1]
        ],
        Form("rows", "scores", {"labels": np.asarray(labels)}),
        array,
    )


def _zero_shot(model: Classifier, items: Iterator[Item], asked: Asked) -> Answers:
    results = model.zero_shot_iter(
        _single(items, model),
        asked.candidate_labels,
        asked.hypothesis_template or TEMPLATE,
        asked.multi_label,
        show_progress_bar=False,
    )

    def ranked(answer: dict[str, Any]) -> list[dict[str, Any]]:
        rows = zip(answer["labels"], answer["scores"])
        return [{"label": label, "score": score} for label, score in rows][: asked.top_k]

    labels = [label.strip() for label in asked.candidate_labels.split(",")]
    return Answers(
        results,
        lambda answer: {"labels": ranked(answer)},
        (_right("score"), Column("label", max(map(len, labels))), _TEXT),
        lambda item, answer: [(row["score"], row["label"], _shown(item)) for row in ranked(answer)],
        Form("none"),
    )


def _tagged(model: Tagger, items: Iterator[Item], asked: Asked) -> Answers:
    strategy = asked.aggregation or "simple"
    if strategy not in AGGREGATIONS:
        raise UsageError(f"--aggregation '{strategy}' is unknown{nearest(strategy, AGGREGATIONS)}")
    entities = model.entities_iter(
        _single(items, model),
        strategy,
        show_progress_bar=False,
        truncate=asked.truncate,
    )

    def cells(item: Item, answer: list[dict[str, Any]]) -> Rows:
        rows = [
            (
                float(entity["score"]),
                entity.get("entity_group") or entity["entity"],
                entity["start"],
                entity["end"],
                item[entity["start"] : entity["end"]],
            )
            for entity in answer
        ]
        return rows or [(None,) * len(columns)]

    label = Column("entity", max(map(len, model.labels), default=7))
    columns = (_right("score"), label, _right("start"), _right("end"), _TEXT)
    return Answers(entities, lambda answer: {"entities": answer}, columns, cells, Form("none"))


# Words


def _filled(model: Filler, items: Iterator[Item], asked: Asked) -> Answers:
    tokens = model.fill_iter(_single(items, model), asked.top_k or 5, truncate=asked.truncate)

    def cells(item: Item, answer: list[Any]) -> Rows:
        masks = answer if isinstance(answer[0], list) else [answer]
        rows = [row for mask in masks for row in mask]
        return [(row["score"], row["token_str"], row["sequence"]) for row in rows]

    columns = (_right("score"), Column("token", 12), Column("sequence", 0))
    return Answers(tokens, lambda answer: {"tokens": answer}, columns, cells, Form("none"))


def _answered(model: Answerer, items: Iterator[Item], asked: Asked) -> Answers:
    top_k = asked.top_k or 1

    def answers() -> Iterator[list[dict[str, Any]]]:
        for number, item in enumerate(items, 1):
            if isinstance(item, str):
                raise UsageError(
                    f"text {number} has no question",
                    "give --question, or pairs of a question and its context",
                )
            for text, name in zip(item, ("question", "context")):
                if not text.strip():
                    raise InputError(f"the {name} of text {number} is blank", "give a text")
            answer = model.answer(*item, top_k)
            yield [answer] if top_k == 1 else answer

    columns = (_right("score"), _right("start"), _right("end"), Column("answer", 0))
    return Answers(
        answers(),
        lambda answer: answer[0] if asked.top_k is None else {"answers": answer},
        columns,
        lambda item, answer: [tuple(row[c.heading] for c in columns) for row in answer],
        Form("none"),
        names=("question", "context"),
    )


_KINDS: Mapping[type, Callable[..., Answers]] = {
    Embedder: _embedded,
    Featurizer: _featured,
    Classifier: _classified,
    Tagger: _tagged,
    Filler: _filled,
    Answerer: _answered,
}
