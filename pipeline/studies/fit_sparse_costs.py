"""Fits the constants of ``sparse_costs`` to this machine.

python -m bertile.studies.fit_sparse_costs --threads 2
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from bertile import loader
from bertile.base.progress import Progress
from bertile.base.tables import table
from bertile.lower import sparse_costs
from bertile.lower.sparse_choice import sparse_task
from bertile.schedules import BLOCK_TOKENS
from bertile.schedules.cpu.product import group
from bertile.schedules.task import Task
from bertile.targets import rows as targets
from bertile.tune.log.chooser import Chooser
from bertile.tune.log.tuning_log import TuningLog
from bertile.tune.measure.trial_runner import TrialRunner
from bertile.tune.search import tuner

# (inputs, outputs, activation, residual): the layers of BERT-base, and two of MiniLM.
LAYERS = (
    (768, 2304, "none", False),
    (768, 768, "none", True),
    (768, 3072, "gelu", False),
    (3072, 768, "none", True),
    (384, 1536, "gelu", False),
    (1536, 384, "none", True),
)
DENSITIES = (3, 10, 20, 40, 60)
PRECISIONS = ("fp32", "fp16", "bf16", "int8")


class Point(NamedTuple):
    """A sparse task, and its time as a share of the dense one's where that is largest."""

    task: Task
    share: float


class Fit(NamedTuple):
    """The constants of ``sparse_costs``, and by what factor a point typically lies beside them."""

    step: dict[str, float]
    start: float
    error: float


def measure(precisions: Sequence[str], row: Any, log: TuningLog, say: Any) -> Iterator[Point]:
    """Both kernels of each layer with the knobs that a build gives them, in one session."""
    choose = Chooser(log, row, say).choose
    with TrialRunner(row) as trials:

        def times(task: Task) -> dict[int, float] | None:
            outcome = trials.run(task, choose(task).knobs, tuner.BLOCKS, row.also_blocks)
            if "error" in outcome:
                say(f"{task.name}: {outcome['error']}")
                return None
            # the fastest of the repeats: what else the machine does only adds to them
            also = {int(tokens): min(repeats) for tokens, repeats in outcome["also"].items()}
            return {tuner.BLOCKS * BLOCK_TOKENS: min(outcome["microseconds"]), **also}

        for precision in precisions:
            for layer in LAYERS:
                shape = dict(zip(("inputs", "outputs", "activation", "residual"), layer))
                if precision != "fp32":
                    shape["precision"] = precision
                dense = times(Task("dense", shape))
                for density in DENSITIES:
                    task = sparse_task(Task("dense", shape), density)
                    sparse = times(task)
                    if dense and sparse:
                        yield Point(task, max(sparse[tokens] / dense[tokens] for tokens in dense))


def fit(points: Sequence[Point]) -> Fit:
    """The constants with the least squares of relative errors."""
    precisions = sorted({_precision(point.task) for point in points})
    matrix = np.zeros((len(points), len(precisions) + 1))
    for place, (task, share) in enumerate(points):
        matrix[place, precisions.index(_precision(task))] = task.shape["density"] / 100 / share
        matrix[place, -1] = 1 / -(-task.shape["inputs"] // group(task)) / share
    costs = np.linalg.lstsq(matrix, np.ones(len(points)), rcond=None)[0]
    errors = np.abs(np.log(np.maximum(matrix @ costs, 1e-3)))
    step = dict(zip(precisions, map(float, costs)))
    return Fit(step, float(costs[-1]), float(np.exp(np.median(errors))))


def as_text(points: Sequence[Point], fitted: Fit) -> str:
    """What was measured beside what the constants in use say, then the constants that fit."""
    rows = [(task.name, share, sparse_costs.relative_time(task)) for task, share in points]
    steps = ", ".join(f"{name} {value:.2f}" for name, value in fitted.step.items())
    return (
        f"{table(('task', 'measured', 'in use'), rows)}\n\n"
        f"STEP {steps}; LIST {fitted.start:.1f}; half of the points within a factor of"
        f" {fitted.error:.2f}"
    )


def _precision(task: Task) -> str:
    return str(task.shape.get("precision", "fp32"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, fit, print."""
    parser = argparse.ArgumentParser(prog="python -m bertile.studies.fit_sparse_costs")
    add = parser.add_argument
    add("--threads", metavar="N", type=int, help="threads to use")
    add("--precision", metavar="NAME", nargs="+", default=PRECISIONS, help="of the layers")
    add("--log-dir", metavar="DIR", help="your own tuning logs")
    options = parser.parse_args(arguments)
    loader.set_thread_defaults()
    row, say = targets.resolve("native", options.threads), Progress().say
    precisions = [precision for precision in options.precision if precision != "bf16" or row.bf16]
    points = list(measure(precisions, row, TuningLog.open(options.log_dir, say), say))
    print(as_text(points, fit(points)))


if __name__ == "__main__":
    main()
