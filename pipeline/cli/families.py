"""Runs `bertile families`: lists the model types of transformers, and what becomes of each."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from bertile.base.progress import Progress
from bertile.base.tables import short, table
from bertile.cli.command import Outcome


def add_arguments(parser: ArgumentParser) -> None:
    """A state, for those that have it alone."""
    from bertile.families import states

    parser.add_argument(
        "--state",
        choices=(states.OWN, states.GENERAL, states.REFUSED),
        help="list the types of this state alone",
    )


def run(options: Namespace, progress: Progress) -> Outcome:
    """A row a type: own row, general road, or refused and why."""
    from bertile.families import states
    from bertile.numerics.precision import PRECISIONS

    rows = [row for row in states.roads() if options.state in (None, row["state"])]
    precisions = list(PRECISIONS)
    data = [
        {**row, "precisions": precisions} if row["state"] == states.OWN else row for row in rows
    ]
    cells = [(row["type"], _STATES[row["state"]], *_errors(row), _what(row)) for row in rows]
    text = table(("model type", "state", "median error", "largest", "what"), cells)
    text += (
        f"\n\nown row: every head of the list, in {', '.join(precisions)}; general road: as ONNX,"
        " fused where a pattern matches,\nany head that transformers has for it; any type that is"
        " not listed goes that road too.\nErrors are those of a tiny random model against"
        " transformers, by the largest value of its output."
    )
    return Outcome(data, text)


_STATES = {"own": "own row", "general": "general road", "refused": "refused"}


def _errors(row: dict[str, Any]) -> tuple[str | None, str | None]:
    if row["state"] == "refused":
        return None, None
    if "median" not in row:
        return "not tried", "not tried"
    return f"{row['median']:.0e}", f"{row['largest']:.0e}"


def _what(row: dict[str, Any]) -> str:
    if row["state"] == "refused":
        return short(row["reason"], 90)
    if row["state"] == "own":
        return short(", ".join(row["heads"]), 90)
    operators = sorted(set(row["operators"]))
    return short(f"TVM's kernels: {', '.join(operators)}" if operators else "all fused", 90)
