"""Runs `bertile prune`."""

from __future__ import annotations

import argparse
from collections import defaultdict
from typing import Any

MODEL = "a directory or hub id of Hugging Face, minilm, or synthetic:NAME"
PATTERN = (
    "4x1 (default; inputs x outputs of a block), 16x1, 32x1, 1x16, 2:4, unstructured, heads or"
    " neurons"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All that the command takes."""
    add = parser.add_argument
    add("model", metavar="MODEL", help=MODEL)
    add("-o", "--output", metavar="DIR", required=True, help="the directory to write")
    add("--sparsity", metavar="S", type=float, help="share of zeros (default: 0.9; 2:4: 0.5)")
    add("--pattern", metavar="NAME", default="4x1", help=PATTERN)


def run(options: argparse.Namespace, progress: Any) -> tuple[Any, str]:
    """The report of what was pruned, and what is printed of it."""
    from bertile.compress import pruner

    report = pruner.prune(
        options.model, options.output, options.sparsity, options.pattern, progress
    )
    return report, as_text(report)


def as_text(report: dict[str, Any]) -> str:
    """A row for all layers of the same place, size and pattern; then what to do about accuracy."""
    from bertile.base.tables import table

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
