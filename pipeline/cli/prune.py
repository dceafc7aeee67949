"""Runs `bertile prune`: sets the smallest weights of a model to zero."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections import defaultdict
from typing import Any

from bertile.base.progress import Progress
from bertile.base.tables import table
from bertile.cli.command import Outcome

MODEL = "a Hugging Face directory or hub name, minilm, or synthetic:NAME"
PATTERN = (
    "4x1 (default; inputs x outputs of a block), 16x1, 32x1, 1x16, 2:4, unstructured, heads or"
    " neurons"
)


def add_arguments(parser: ArgumentParser) -> None:
    """All that the command takes."""
    add = parser.add_argument
    add("model", metavar="MODEL", help=MODEL)
    add("-o", "--output", metavar="DIR", required=True, help="the directory to write")
    add("--sparsity", metavar="S", type=float, help="share of zeros (default: 0.9; 2:4: 0.5)")
    add("--pattern", metavar="NAME", default="4x1", help=PATTERN)


def run(options: Namespace, progress: Progress) -> Outcome:
    """Write the model as a Hugging Face directory; gives the report of what was pruned."""
    from bertile.compress import pruner

    report = pruner.prune(
        options.model, options.output, options.sparsity, options.pattern, progress
    )
    return Outcome(report, as_text(report))


def as_text(report: dict[str, Any]) -> str:
    """A row for all layers of the same place, size and pattern; then what to do about accuracy."""
    groups = defaultdict(list)
    for row in report["layers"]:
        place = ".".join(part for part in row["layer"].split(".") if not part.isdigit())
        groups[place, row["inputs"], row["outputs"], row["pattern"]].append(row["zeros"])
    rows = [
        [place, len(zeros), inputs, outputs, 100 * sum(zeros) / len(zeros), pattern]
        for (place, inputs, outputs, pattern), zeros in groups.items()
    ]
    text = table(["layers", "count", "inputs", "outputs", "zeros %", "pattern"], rows)
    weights = sum(row["inputs"] * row["outputs"] for row in report["layers"])
    zeros = sum(row["inputs"] * row["outputs"] * row["zeros"] for row in report["layers"])
    return (
        f"{text}\n\n{zeros / weights:.1%} of {weights / 1e6:.1f} million weights are zero, written"
        f" to {report['output']}\n{report['accuracy']}"
    )
