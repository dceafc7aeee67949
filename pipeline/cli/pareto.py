"""Runs `bertile pareto`: draws what models are worth against what they cost."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from bertile.base.allowed import TRAINED_TASKS
from bertile.base.errors import UsageError
from bertile.base.progress import Progress
from bertile.base.tables import table
from bertile.cli.command import Outcome
from bertile.cli.config_flags import add_some_config, read_config
from bertile.cli.option_lists import positive, words

POINTS = (
    "a model, or what bertile compress has written, with a precision: out/small@int8, or"
    " NAME=out/small@int8; with early heads also the confidence to leave at: out/early@int8:0.9"
)
RECIPES = (
    "recipes to train --model by, joined by +, with a precision: prune-90+distill+int8@int8; may be"
    " repeated"
)
CONFIG = ("target", "threads", "tune", "log-dir", "shipped-log", "cache-dir", "calibrate", "ranges")


def add_arguments(parser: ArgumentParser) -> None:
    """The points, the texts, and how they are measured."""
    add = parser.add_argument
    add("points", metavar="[NAME=]MODEL[@PRECISION][:THRESHOLD]", nargs="*", help=POINTS)
    add("-o", "--output", metavar="DIR", required=True, help="the directory to write")
    add(
        "--data",
        metavar="FILE",
        required=True,
        help="texts to evaluate on: labelled .tsv or .jsonl, or sentences .txt",
    )
    add(
        "--against",
        metavar="ENGINE",
        nargs="+",
        default=["onnxruntime", "openvino"],
        help="engines to measure beside Bertile (default: onnxruntime openvino), or none",
    )
    add("--length", metavar="N", type=positive, default=128, help="tokens of the timed text (128)")
    add("--repeat", metavar="N", type=positive, default=30, help="timed calls of each engine")
    add(
        "--instructions",
        action="store_true",
        help="count those of a text, by perf, or by valgrind, which takes minutes a model",
    )
    add(
        "--reference",
        metavar="NAME",
        help="without labels: the point in fp32 that answers are compared with (default: the"
        " first)",
    )
    add = parser.add_argument_group(
        "training", "Points that are trained first; what is trained already is taken as it is."
    ).add_argument
    add("--recipe", metavar="NAME[+NAME...]", action="append", default=[], help=RECIPES)
    add("--set", metavar="KEY=VALUE", action="append", default=[], help="change all recipes")
    add("--model", metavar="MODEL", help="what is trained, and the teacher")
    add("--task", metavar="|".join(TRAINED_TASKS), help="what the texts are for")
    add("--train", metavar="DATA", help="texts to train on, as bertile compress takes them")
    add("--unlabelled", metavar="DATA", action="append", default=[], help="more of them")
    add("--models", metavar="DIR", help="where the models are kept (default: DIR.models)")
    add_some_config(parser, *CONFIG)


def run(options: Namespace, progress: Progress) -> Outcome:
    """Compile, measure and draw; gives all numbers."""
    from bertile import loader
    from bertile.report import frontier

    config = read_config(options)
    loader.set_thread_defaults()
    points = [frontier.parse(text) for text in options.points]
    points += _trained(options, progress)
    if not points:
        raise UsageError("no point is asked for", "give models, or recipes with --recipe")
    content = frontier.write(
        points,
        options.data,
        options.output,
        config,
        progress,
        words(options.against),
        options.length,
        options.repeat,
        options.reference,
        options.instructions,
    )
    return Outcome(content, as_text(content))


def _trained(options: Namespace, progress: Progress) -> list[Any]:
    """A point for each recipe, whose model is trained unless it is there."""
    for name in ("model", "task", "train"):
        if options.recipe and getattr(options, name) is None:
            raise UsageError(f"--{name} is missing", "--recipe trains models: see --help")
    if not options.recipe:
        return []
    from bertile.report import trained_points

    return [
        trained_points.trained(
            text,
            options.model,
            options.task,
            options.train,
            options.data,
            options.unlabelled,
            options.set,
            options.models or f"{options.output}.models",
            progress,
        )
        for text in options.recipe
    ]


def as_text(content: dict[str, Any]) -> str:
    """A row for each engine of each point; then where the page is."""
    metric = content["metric"]
    rows = [
        [
            row["model"],
            row["engine"],
            row["precision"],
            f"{row['score']:.4f}",
            f"{row['low']:.4f} … {row['high']:.4f}",
            f"{row['median_ms']:.2f}",
        ]
        for row in content["rows"]
    ]
    columns = ["model", "engine", "precision", metric, "95% interval", "ms"]
    notes = "".join(f"\n{note}" for note in content["notes"])
    return f"{table(columns, rows)}\n{notes}\n{content['output']}/pareto.html"
