"""Trains the models of a frontier by recipes, each once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bertile.base.progress import Progress
from bertile.base.quiet import quiet
from bertile.compress import recipe
from bertile.export.learned_ranges import REPORT
from bertile.report.frontier import Point, split_precision


def trained(
    text: str,
    model: str,
    task: str,
    data: str,
    evaluate: str,
    unlabelled: Sequence[str],
    settings: Sequence[str],
    directory: str | Path,
    progress: Progress,
) -> Point:
    """The point of some recipes, joined by +, and maybe a precision behind @.

    The model is trained into a directory of their names, unless it is there. A recipe that trains
    in int8 is compiled in int8 where no precision is named. Raises what `compressor.compress` does.
    """
    joined, precision = split_precision(text)
    chosen = recipe.read(joined.split("+"), settings)
    output = Path(directory) / joined
    if not (output / REPORT).is_file():
        with quiet():  # what libraries say of parts of their own that they cannot load
            from bertile.compress import compressor
        progress.say(f"train {joined}")
        compressor.compress(
            model, output, chosen, task, data, evaluate, unlabelled, progress=progress
        )
    fallback = "int8" if chosen.quantize is not None else "fp32"
    precision = precision or fallback
    return Point(f"{joined} {precision}", str(output), precision)
