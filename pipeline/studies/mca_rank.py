"""Measures how well llvm-mca's estimate ranks what kernels really take on this machine.

python -m bertile.studies.mca_rank --threads 1
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tvm

from bertile import loader
from bertile.base.progress import Progress
from bertile.base.tables import table
from bertile.schedules import BLOCK_TOKENS, trial_sample
from bertile.schedules.cpu import SCHEDULES
from bertile.schedules.schedule import Knobs
from bertile.schedules.task import Task
from bertile.targets import rows as targets
from bertile.tune.estimate import mca
from bertile.tune.estimate.estimator import Estimator
from bertile.tune.log.tuning_log import SURE
from bertile.tune.measure import trial
from bertile.tune.measure.roofline import use_threads
from bertile.tune.search import tuner

SETTINGS = 30
ROUNDS = 6  # of all candidates of a task, one after the other; each one's fastest counts
# (inputs, outputs, activation, residual): of BERT-base and of MiniLM.
LAYERS = ((768, 768, "none", True), (768, 3072, "gelu", False), (1536, 384, "none", True))
PRECISIONS = ("fp32", "bf16", "int8")


class Point(NamedTuple):
    """One choice of knobs: microseconds by numbers of tokens, as estimated and as measured."""

    knobs: Knobs
    estimated: dict[int, float]
    measured: dict[int, float]


class Ranking(NamedTuple):
    """How well estimates order candidates.

    ``correlation`` is Spearman's; ``regret`` is by how much the candidate that is estimated to be
    best is slower than the best, ``of_five`` the same of the five estimated best, ``default`` the
    same of the first candidate, ``taken`` of what a log with these estimates gives. ``error`` is
    the median of how far estimates are off, ``promised`` what a gain over the default is promised
    too high, of all but one in ten candidates.
    """

    correlation: float
    regret: float
    of_five: float
    default: float
    taken: float
    error: float
    promised: float


def tasks(precisions: Sequence[str]) -> list[Task]:
    """The layers in each precision."""
    all_tasks = []
    for precision in precisions:
        for layer in LAYERS:
            shape = dict(zip(("inputs", "outputs", "activation", "residual"), layer))
            of_precision = {} if precision == "fp32" else {"precision": precision}
            all_tasks.append(Task("dense", {**shape, **of_precision}))
    return all_tasks


def measure(task: Task, row: Any, settings: int, say: Any) -> list[Point]:
    """The default and random choices of knobs, each estimated and measured."""
    space, draw = SCHEDULES[task.operation].space(task, row), random.Random(0)
    chosen = [SCHEDULES[task.operation].default(task, row)]
    while len(chosen) < settings:
        knobs = {name: draw.choice(choices) for name, choices in space.items()}
        if knobs not in chosen:
            chosen.append(knobs)
    guesses = []
    with Estimator(row) as estimator:
        for number, knobs in enumerate(chosen):
            say(f"{task.name}  estimate {number + 1} of {settings}")
            estimate = estimator.run(task, knobs, tuner.BLOCKS, row.also_blocks)
            also = {int(tokens): times[0] for tokens, times in estimate["also"].items()}
            guesses.append({tuner.BLOCKS * BLOCK_TOKENS: estimate["microseconds"][0], **also})
    say(f"{task.name}  build and measure {settings}")
    return [Point(*columns) for columns in zip(chosen, guesses, measured(task, row, chosen))]


def measured(task: Task, row: Any, chosen: Sequence[Knobs]) -> list[dict[int, float]]:
    """Microseconds by numbers of tokens, of each the least: what else the machine does only adds.

    In rounds, so that a slow minute of the machine is no candidate's own.
    """
    use_threads(row.threads)
    built = [trial.build(task, knobs, row) for knobs in chosen]
    samples = [trial_sample(task, count, row) for count in (tuner.BLOCKS, *row.also_blocks)]
    pack = SCHEDULES[task.operation].pack
    packed = [pack(task, knobs, samples[0].weights, row) for knobs in chosen]
    activations = [
        [tvm.runtime.tensor(array) for array in sample.activations] for sample in samples
    ]
    results = [[tvm.runtime.tensor(array) for array in sample.buffers()] for sample in samples]
    best = np.full((len(chosen), len(samples)), np.inf)
    for _ in range(ROUNDS):
        for times, run, weights in zip(best, built, packed):
            cold = trial.copies(weights)
            for n in range(len(samples)):
                arguments = [[*activations[n], *copied] for copied in cold]
                times[n] = min(times[n], trial.repeat(run, arguments, results[n]))
    tokens = [count * BLOCK_TOKENS for count in (tuner.BLOCKS, *row.also_blocks)]
    return [dict(zip(tokens, map(float, milliseconds))) for milliseconds in best]


def rank(points: Sequence[Point], tokens: int | None) -> Ranking:
    """Of the times on that many tokens; None: as the tuner ranks, by the mean over all of them."""
    guess = np.array([_time(point.estimated, tokens) for point in points])
    real = np.array([_time(point.measured, tokens) for point in points])
    order = np.argsort(guess, kind="stable")
    first, best = order[0], real.min()
    taken = first if guess[0] > SURE * guess[first] else 0
    promised = (guess[0] / guess) / (real[0] / real)
    return Ranking(
        correlation=float(np.corrcoef(_ranks(guess), _ranks(real))[0, 1]),
        regret=float(real[first] / best - 1),
        of_five=float(real[order[:5]].min() / best - 1),
        default=float(real[0] / best - 1),
        taken=float(real[taken] / best - 1),
        error=float(np.median(np.abs(guess / real - 1))),
        promised=float(np.quantile(promised, 0.9) - 1),
    )


def as_text(by_task: dict[Task, list[Point]], markdown: bool = False) -> str:
    """A row per task and number of tokens, and one for what the tuner goes by."""
    header = ("task", "tokens", "settings", "rank correlation", "regret %", "of best five %")
    header += ("default %", "taken %", "median error %", "promised too much %")
    rows = []
    for task, points in by_task.items():
        for tokens in (*sorted(points[0].measured), None):
            ranked = rank(points, tokens)
            shares = (round(100 * value, 1) for value in ranked[1:])
            rows.append((task.name, tokens or "all", len(points), round(ranked[0], 2), *shares))
    return table(header, rows, markdown)


def _time(times: dict[int, float], tokens: int | None) -> float:
    if tokens is not None:
        return times[tokens]
    return float(np.exp(np.mean(np.log(list(times.values())))))


def _ranks(values: np.ndarray) -> np.ndarray:
    return np.argsort(np.argsort(values, kind="stable"), kind="stable").astype("float64")


def main(arguments: Sequence[str] | None = None) -> None:
    """Estimate, measure, compare, print."""
    parser = argparse.ArgumentParser(prog="python -m bertile.studies.mca_rank")
    add = parser.add_argument
    add("--threads", metavar="N", type=int, default=1, help="cores to use (default: 1)")
    add("--precision", metavar="NAME", nargs="+", default=PRECISIONS, help="of the layers")
    add("--settings", metavar="N", type=int, default=SETTINGS, help="choices of knobs of each task")
    add("--markdown", action="store_true", help="print the table as Markdown")
    options = parser.parse_args(arguments)
    loader.set_thread_defaults()
    row, progress = targets.resolve("native", options.threads), Progress()
    mca.tool(mca.model_of(row))
    able = [precision for precision in options.precision if precision != "bf16" or row.bf16]
    by_task = {task: measure(task, row, options.settings, progress.status) for task in tasks(able)}
    progress.close()
    print(as_text(by_task, options.markdown))


if __name__ == "__main__":
    main()
