"""Serves a tuner from a process of its own, whatever it measures on: requests as JSON lines in,
results as JSON lines out.

A candidate that crashes or hangs costs only its own trial. A result is either {"microseconds": [one
per repeat]} or {"error": "what happened"}.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from bertile.loader import set_thread_defaults
from bertile.schedules import BLOCK_TOKENS, trial_sample
from bertile.schedules.schedule import Sample
from bertile.schedules.task import Task
from bertile.targets.rows import Target


def serve(measure: Callable[..., dict[str, Any]]) -> None:
    """Answer requests for what ``measure`` says, until the input ends."""
    set_thread_defaults()
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no answer
    for line in sys.stdin:
        try:
            answer = measure(**json.loads(line))
        except Exception as error:  # every failure of a candidate is its result
            answer = {"error": f"{type(error).__name__}: {str(error).strip()[-300:]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def answer(
    task: Task,
    row: Target,
    counts: Sequence[int],
    times: Callable[[Sample], list[float] | str],
) -> dict[str, Any]:
    """A trial's result, of the first of these numbers of blocks and of the others.

    ``times`` says the microseconds of each repeat on a sample, or what is wrong with the result.
    """
    by_count: dict[int, list[float]] = {}
    for count in counts:
        measured = times(trial_sample(task, count, row))
        if isinstance(measured, str):
            return {"error": f"{measured} on {count} blocks"}
        by_count[count] = measured
    also = {str(count * BLOCK_TOKENS): by_count[count] for count in counts[1:]}
    return {"microseconds": by_count[counts[0]], "also": also}
