"""Proposes the candidates of a task that are worth measuring next, by what the log says.

For devices that answer in rounds: the local search asks for a time and goes on, here a whole round
of candidates leaves at once. XGBoost learns from the knobs and times that are known, as the cost
model of ``search`` does; before there are some, candidates are drawn at random.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np

from bertile.schedules import schedules_for
from bertile.schedules.schedule import Knobs, Space
from bertile.schedules.task import Task
from bertile.targets.rows import Target
from bertile.tune.log.tuning_log import Record

ENOUGH = 8  # known times, from which the model says more than chance
POOL = 4096  # points of a space that are looked at
BY_CHANCE = 4  # of a round, one of so many


def propose(task: Task, row: Target, records: Sequence[Record], count: int) -> list[Knobs]:
    """Up to ``count`` candidates that no record has, the most promising first.

    The default is the first of all. ``records`` are of this task on this row and number of threads.
    """
    schedule = schedules_for(row)[task.operation]
    space, default = schedule.space(task, row), schedule.default(task, row)
    tried = {_key(record.knobs) for record in records}
    pool = [knobs for knobs in _points(space, len(tried)) if _key(knobs) not in tried]
    known = [record for record in records if record.microseconds]
    if len(known) >= ENOUGH:
        pool = _ranked(pool, known, sorted(space), count)
    if _key(default) not in tried:
        pool = [default, *(knobs for knobs in pool if _key(knobs) != _key(default))]
    return pool[:count]


def _points(space: Space, seed: int) -> list[Knobs]:
    """All of a small space, else random ones; in random order, another in each round."""
    draw, names = random.Random(seed), sorted(space)
    total = math.prod(len(space[name]) for name in names)
    numbers = draw.sample(range(total), min(total, POOL))
    points = []
    for number in numbers:
        knobs = {}
        for name in names:
            number, choice = divmod(number, len(space[name]))
            knobs[name] = space[name][choice]
        points.append(knobs)
    return points


def _ranked(
    pool: list[Knobs], known: Sequence[Record], names: Sequence[str], count: int
) -> list[Knobs]:
    """The pool by estimated time; some of the first ``count`` stay as chance has them."""
    import xgboost

    model = xgboost.XGBRegressor(n_estimators=100, max_depth=6, learning_rate=0.2, n_jobs=1)
    times = np.log([record.median for record in known])
    model.fit(_features([record.knobs for record in known], names), times)
    order = np.argsort(model.predict(_features(pool, names)), kind="stable")
    chance = count // BY_CHANCE
    best = [pool[place] for place in order[: count - chance]]
    chosen = {_key(knobs) for knobs in best}
    return best + [knobs for knobs in pool if _key(knobs) not in chosen]


def _features(points: Sequence, names: Sequence[str]) -> np.ndarray:
    values = np.array([[point[name] for name in names] for point in points], "float32")
    return np.concatenate([values, np.log2(1 + values)], 1)


def _key(knobs) -> tuple:
    return tuple(sorted(knobs.items()))
