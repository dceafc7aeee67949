"""Runs `bertile run`: texts in, a model's answers out, line by line or into a file."""

from __future__ import annotations

import os
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import chain, count, tee
from typing import TYPE_CHECKING, Any

from bertile.base.allowed import AGGREGATIONS
from bertile.base.errors import UsageError
from bertile.base.progress import Progress
from bertile.cli import text_files
from bertile.cli.command import Outcome, Stream, add_bundle
from bertile.cli.option_lists import positive
from bertile.cli.text_files import Item, Layout

if TYPE_CHECKING:
    from bertile.cli.answers import Answers, Asked
    from bertile.text import TextModel


def add_arguments(parser: ArgumentParser) -> None:
    """A bundle, its texts, what is asked of it, and where the answers go."""
    add_bundle(parser)
    add = parser.add_argument
    add(
        "texts",
        metavar="TEXT",
        nargs="*",
        help="a text; behind -- it may begin with a dash; none: each line of stdin is a text",
    )
    add(
        "-o",
        "--output",
        metavar="FILE",
        help="write the answers into an .npy, .npz or .jsonl; -: JSON lines on stdout",
    )
    add("--threads", metavar="N", type=positive, help="threads to use (default: all cores)")
    add(
        "--exit-threshold",
        metavar="0..1",
        type=float,
        help="how sure a classifier must be of a text that leaves early (default: as compiled)",
    )
    _add_reading(parser.add_argument_group("the texts").add_argument)
    _add_asking(parser.add_argument_group("what is asked").add_argument)


def _add_reading(add: Any) -> None:
    files = (
        "a file in UTF-8: a text a line, or .jsonl, .csv, .tsv; -: stdin (--file is its old name)"
    )
    add("--input", "--file", metavar="FILE", help=files)
    add(
        "--pair",
        action="store_true",
        help="texts are pairs: of two arguments each, or with a tab between them in a line",
    )
    add(
        "--field",
        metavar="NAME",
        action="append",
        default=[],
        help="the field of JSON lines (default: text; pairs: text, text_pair, or question, context;"
        " given twice, a pair)",
    )
    add(
        "--column",
        metavar="NAME",
        action="append",
        default=[],
        help="the column of a CSV: a name in its first line (default: as --field), or a number from"
        " 1, where the first line is a text too",
    )
    add("--no-truncate", action="store_true", help="refuse a text that is too long, cut none")


def _add_asking(add: Any) -> None:
    add("--similarity", action="store_true", help="how alike each text is to every other")
    add("--prompt-name", metavar="NAME", help="the model's prompt of this name before each text")
    add("--prompt", metavar="TEXT", help="this before each text")
    add("--normalize", action="store_true", help="vectors of length 1")
    add("--truncate-dim", metavar="N", type=positive, help="the first numbers of vectors alone")
    add(
        "--question",
        metavar="TEXT",
        help="ask this of each text; of a reranker: how well each text answers it",
    )
    add("--top-k", metavar="N", type=positive, help="so many labels, answers or words of each")
    add(
        "--candidate-labels",
        metavar="LABEL,…",
        help="which of these fits each text, by a model trained on entailment (zero-shot)",
    )
    add(
        "--hypothesis-template",
        metavar="TEXT",
        help='how a label becomes a sentence: "This example is {}."',
    )
    add("--multi-label", action="store_true", help="each of these labels is for itself")
    add("--aggregation", metavar="|".join(AGGREGATIONS), help="how tokens are joined to entities")


def run(options: Namespace, progress: Progress) -> Outcome | Stream:
    """The answers as lines, or where they were written."""
    items = _asked_of(_items(options), options.question)
    first = next(items)
    items = chain([first], items)
    if options.output not in (None, "-"):
        _check_output(options)
    from bertile import text
    from bertile.cli import answers

    asked = answers.Asked(
        pairs=not isinstance(first, str),
        question=options.question,
        top_k=options.top_k,
        aggregation=options.aggregation,
        candidate_labels=options.candidate_labels,
        hypothesis_template=options.hypothesis_template,
        multi_label=options.multi_label,
        prompt_name=options.prompt_name,
        prompt=options.prompt,
        normalize=options.normalize,
        truncate_dim=options.truncate_dim,
        similarity=options.similarity,
        truncate=not options.no_truncate,
    )
    model = text.open(options.bundle, options.threads, exit_threshold=options.exit_threshold)
    if options.output not in (None, "-"):
        with model:
            return _written(model, items, asked, options.output, progress)
    as_json = options.json or options.output == "-"
    return Stream(_printed(model, items, asked, as_json, progress))


def _items(options: Namespace) -> Iterator[Item]:
    layout = Layout(options.pair, options.field, options.column)
    if options.texts and options.input is not None:
        raise UsageError("texts and --input exclude each other", "leave one of them out")
    if options.texts:
        if layout.fields or layout.columns:
            raise UsageError("--field and --column are for files", "leave them out")
        return iter(text_files.of_arguments(options.texts, options.pair))
    if options.input is None and (sys.stdin is None or sys.stdin.isatty()):
        raise UsageError("there is no text", text_files.REMEDY)
    return text_files.of_file(text_files.STDIN if options.input is None else options.input, layout)


def _asked_of(items: Iterator[Item], question: str | None) -> Iterator[Item]:
    """The texts behind the question that is asked of each, where there is one."""
    if question is None:
        return items
    return (_behind(question, number, item) for number, item in enumerate(items, 1))


def _behind(question: str, number: int, item: Item) -> Item:
    if not isinstance(item, str):
        raise UsageError(
            f"text {number} is a pair, and --question makes pairs of texts", "leave one out"
        )
    return question, item


def _check_output(options: Namespace) -> None:
    """Raise UsageError for an output that cannot be, before anything takes time."""
    from bertile.cli.result_files import ending_of

    ending_of(options.output)
    if options.input and os.path.exists(options.output) and os.path.exists(options.input):
        if os.path.samefile(options.output, options.input):
            raise UsageError(f"'{options.output}' is the input too", "choose another output")


def _printed(
    model: TextModel,
    items: Iterable[Item],
    asked: Asked,
    as_json: bool,
    progress: Progress,
) -> Iterator[str]:
    """The answers as lines of JSON, or of a table."""
    from bertile.base.tables import Column, running
    from bertile.cli.answers import ask
    from bertile.cli.result_files import as_json as line

    began = time.perf_counter()
    with model:
        items, texts = tee(items)
        answers = ask(model, items, asked)
        with closing(_beside(answers, texts)) as pairs:
            if as_json:
                for item, answer in pairs:
                    yield line(_record(answers, item, answer))
            else:
                numbered = (
                    (number, *row)
                    for number, (item, answer) in zip(count(1), pairs)
                    for row in answers.cells(item, answer)
                )
                yield from running([Column("#", 3, right=True), *answers.columns], numbered)
        _say_cut(model, progress)
        _say_layers(model, progress, time.perf_counter() - began)


def _written(
    model: TextModel,
    items: Iterable[Item],
    asked: Asked,
    output: str,
    progress: Progress,
) -> Outcome:
    """Write the answers into a file; gives how many there are."""
    from bertile.base.tables import lines
    from bertile.cli.answers import ask
    from bertile.cli.result_files import ResultFile

    items, texts = tee(items)
    answers = ask(model, items, asked)
    written, began = 0, time.perf_counter()
    with ResultFile(output, answers.form) as file, progress.bar("texts") as bar:
        with closing(_beside(answers, texts)) as pairs:
            for item, answer in pairs:
                file.write(_record(answers, item, answer), answers.array(answer))
                written += 1
                bar.advance()
    _say_cut(model, progress)
    _say_layers(model, progress, time.perf_counter() - began)
    result = {"output": output, "texts": written, "cut": model.truncated}
    if model.layers:
        result["layers"] = dict(sorted(model.layers.items()))
    return Outcome(result, lines(result))


def _beside(answers: Answers, texts: Iterator[Item]) -> Iterator[tuple[Item, Any]]:
    """Each text with its answer; the texts have been read for the answers before."""
    with closing(answers.stream):  # what still runs ends before the model is closed
        for answer in answers.stream:
            yield next(texts), answer


def _record(answers: Answers, item: Item, answer: Any) -> dict[str, Any]:
    """What JSON says of a text: itself, and the answer."""
    said = {"text": item} if isinstance(item, str) else dict(zip(answers.names, item))
    return {**said, **answers.record(answer)}


def _say_layers(model: TextModel, progress: Progress, seconds: float) -> None:
    """How many encoder layers texts went through, where they leave early."""
    if not model.layers:
        return
    total = sum(model.layers.values())
    parts = [f"layer {n}: {count / total:.1%}" for n, count in sorted(model.layers.items())]
    mean = sum(n * count for n, count in model.layers.items()) / total
    progress.say(
        f"texts left behind {', '.join(parts)}; {mean:.2f} layers and"
        f" {seconds / total * 1e3:.2f} ms a text, with tokenizing"
    )


def _say_cut(model: TextModel, progress: Progress) -> None:
    if model.truncated:
        texts = "text was" if model.truncated == 1 else "texts were"
        progress.say(f"{model.truncated} {texts} cut to {model.max_seq_length} tokens")
