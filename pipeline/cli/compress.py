"""Runs `bertile compress`: trains a model into a smaller or faster one."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from bertile.base.allowed import TRAINED_TASKS
from bertile.base.progress import Progress
from bertile.base.tables import lines
from bertile.cli.command import Outcome

MODEL = "a Hugging Face directory or hub name, or minilm"
DATA = (
    "texts to train on: .csv, .tsv, .jsonl, .json (SQuAD) or .txt, a directory that datasets has"
    " saved, debian (package descriptions), or docstrings"
)
RECIPES = "a recipe by name (bertile compress --recipes), or a JSON file; may be repeated"


def add_arguments(parser: ArgumentParser) -> None:
    """All that the command takes."""
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", help=MODEL)
    add("-o", "--output", metavar="DIR", help="the directory to write")
    add("--task", metavar="|".join(TRAINED_TASKS), help="what the texts are for")
    add("--data", metavar="DATA", help=DATA)
    add("--recipe", metavar="NAME", action="append", default=[], help=RECIPES)
    add(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="change a recipe: train.steps=500, prune.sparsity=0.8; may be repeated",
    )
    add("--eval", metavar="DATA", help="texts to evaluate on (default: a tenth of --data)")
    add(
        "--unlabelled",
        metavar="DATA",
        action="append",
        default=[],
        help="more texts, which a teacher labels; may be repeated",
    )
    add("--teacher", metavar="MODEL", help="whose answers are followed (default: MODEL itself)")
    add(
        "--work",
        metavar="DIR",
        help="where the training is kept, and goes on after a stop (default: DIR.work)",
    )
    add("--threads", metavar="N", type=int, help="threads of torch (default: all cores)")
    add("--recipes", action="store_true", help="list the recipes, and stop")


def run(options: Namespace, progress: Progress) -> Outcome:
    """Train and write; gives what compression.json says."""
    from bertile.base.errors import UsageError, require
    from bertile.base.quiet import quiet
    from bertile.compress import recipe

    if options.recipes:
        listed = {name: recipe.read([name]).to_dict() for name in recipe.names()}
        shown = {name: _in_words(name, sections) for name, sections in listed.items()}
        return Outcome(listed, lines(shown))
    for name in ("model", "output", "task", "data"):
        if getattr(options, name) is None:
            flag = "MODEL" if name == "model" else f"--{name}"
            raise UsageError(f"{flag} is missing", "see: bertile compress --help")
    chosen = recipe.read(options.recipe, options.set)
    (torch,) = require("export", "torch")
    if options.threads:
        torch.set_num_threads(options.threads)
    with quiet():  # what libraries say of parts of their own that they cannot load
        require("train", "accelerate", "tensorboard")
        from bertile.compress import compressor

    report = compressor.compress(
        options.model,
        options.output,
        chosen,
        options.task,
        options.data,
        options.eval,
        options.unlabelled,
        options.teacher,
        options.work,
        progress,
    )
    return Outcome(report, as_text(report))


def as_text(report: dict[str, Any]) -> str:
    """What a run comes to."""
    rows = {
        "model": report["output"],
        report["metric"]: f"{report['score']:.4f} on {report['examples']['test']} texts",
        "zeros": f"{report['zeros']:.1%} of the encoder's weights",
        "steps": report["steps"],
    }
    if "exits" in report:
        rows["early heads"] = ", ".join(f"{score:.4f}" for score in report["exits"])
    if "storage" in report:
        rows["storage"] = report["storage"]["note"]
    precision = " --precision int8" if "attention" in report else ""
    rows["next"] = f"bertile compile {report['output']} -o BUNDLE{precision}"
    return lines(rows)


def _in_words(name: str, sections: dict[str, Any]) -> str:
    from bertile.compress import recipe

    plain = recipe.Train()
    return "; ".join(
        f"{section}: " + ", ".join(f"{key} {value}" for key, value in values.items())
        for section, values in sections.items()
        if section != "train" or values != recipe.dataclasses.asdict(plain)
    )
