"""Chooses, for each layer, whether the zeros of its weight are skipped, and says why."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from statistics import geometric_mean
from typing import Any, NamedTuple

import numpy as np
from tvm import relax

from bertile.base.machine import identity
from bertile.base.tables import table
from bertile.graph import ops
from bertile.graph.graph import Graph
from bertile.graph.rewriting.dataflow import Dataflow, rewrite
from bertile.lower.forms import Forms
from bertile.lower.sparse_costs import relative_time
from bertile.numerics.precision import LayerPlan, Plan, ZerosPlan
from bertile.numerics.zeros import Sparsity, analyse, density
from bertile.schedules.cpu.product import group
from bertile.schedules.cpu.sparse import sparse
from bertile.schedules.reference import with_bounds, without_bounds
from bertile.schedules.task import Task
from bertile.targets.rows import Target
from bertile.tune.log.tuning_log import Record, TuningLog

# A task says its density as the next of these, so that layers that are nearly alike share a kernel.
DENSITIES = (1, 2, 3, 5, 7, 10, 15, 20, 25, 30, 40, 50, 60, 80, 100)
NEAR = 1.05  # times a density is still that density: pruning seldom keeps a round number of blocks
LEAST_GAIN = 0.95  # of the dense kernel's time: less than the machine's own weather gains nothing
DOUBT = 1.15  # times an estimated time: by how much the cost model is typically wrong


class Time(NamedTuple):
    """Microseconds of a task's kernel, on how many threads, and by what they were measured: only
    those of one processor can be compared, and those that were estimated among themselves.
    """

    median: float
    task: Task
    threads: int
    by: tuple[Any, ...]

    @classmethod
    def of(cls, record: Record, task: Task, share: float = 1.0) -> Time:
        """The time of a task that takes a share of what a record says."""
        by = (record.estimated, *identity(record.machine))
        return cls(record.median * share, task, record.threads, by)

    def comparable(self, other: Time) -> bool:
        """Whether the two are of one machine and number of threads."""
        return (self.threads, self.by) == (other.threads, other.by)


class SparseChoice:
    """Chooses between the dense and the sparse kernel of each layer of one graph.

    `sparse` "auto" takes the sparse one where it is faster for short and for long requests: by what
    `log` has of both measured in turns, else by the times of both where it has them on the same
    number of threads, else by ``sparse_costs``. "off" takes the dense one, "always" the sparse one
    even where there are no zeros, which is for measuring. Weights are looked at once.
    """

    def __init__(
        self, params: Mapping[str, np.ndarray], row: Target, log: TuningLog | None, sparse: str
    ) -> None:
        self.params, self.row, self.log, self.sparse = params, row, log, sparse
        self._analysed: dict[str, Sparsity] = {}
        self._lanes: dict[tuple[str, int], float] = {}

    def apply(self, graph: Graph) -> Graph:
        """The graph with the density of each weight whose zeros are skipped in the calls that read
        it, and with what is known of the zeros in its plan.
        """
        if self.sparse == "off":
            return graph
        forms, uses = Forms(graph), defaultdict(list)
        for var, name in layers(forms):
            uses[name].append(forms.task(var))
        plan = dict(graph.plan)
        for name, tasks in uses.items():
            plan[name] = dataclasses.replace(plan[name], sparse=self.plan(name, tasks))

        def skip(flow: Dataflow, call: relax.Call) -> Any:
            name = _weight(flow, call)
            chosen = plan[name].sparse if name in uses else None
            return ops.with_density(call, chosen.density) if chosen and chosen.density else None

        return dataclasses.replace(rewrite(graph, skip), plan=plan)

    def plan(self, name: str, tasks: Sequence[Task]) -> ZerosPlan:
        """What becomes of a weight's zeros, given the "dense" tasks that read it: it is stored
        once, so all get the same kernel.
        """
        seen = self._sparsity(name)
        lanes = self._share(name, group(tasks[0]))
        known = ZerosPlan(seen.pattern, seen.zeros, lanes)
        if self.sparse == "off" or (self.sparse == "auto" and seen.pattern == "dense"):
            return known
        percent = rounded(lanes)
        if lacks := sparse.refuses(sparse_task(tasks[0], percent)):
            return dataclasses.replace(known, why=f"zeros are not skipped in {lacks}")
        if self.sparse == "always":
            return dataclasses.replace(known, density=percent, why="asked for")
        share, why = self._compared(tasks, percent)
        chosen = percent if share <= LEAST_GAIN else None
        return dataclasses.replace(known, density=chosen, why=why)

    def time(self, name: str, task: Task) -> Time | None:
        """What the kernel takes that a layer with this "dense" task gets; None where the log has
        not enough to tell.
        """
        if self.log is None:
            return None
        dense = self._record(task)
        chosen = self.plan(name, [task]).density
        if chosen is None:
            return Time.of(dense, task) if dense is not None else None
        skipping = sparse_task(task, chosen)
        if (record := self._record(skipping)) is not None:
            return Time.of(record, skipping)
        if dense is None:
            return None
        return Time.of(dense, skipping, relative_time(skipping, self.row))

    def share(self, mine: Time, other: Time) -> float | None:
        """What one kernel takes as a share of another, None where they cannot be compared."""
        if self.log is None or not mine.comparable(other):
            return None
        if shares := self.log.shares(mine.task, other.task, self.row):
            return geometric_mean(shares.values())
        return mine.median / other.median

    def _compared(self, tasks: Sequence[Task], percent: int) -> tuple[float, str]:
        """The sparse kernel's time as a share of the dense one's, of the requests that were
        measured the one where it is largest, or more than is estimated; and what it rests on.
        """
        skipping = [sparse_task(task, percent) for task in tasks]
        if shares := self._in_turns(skipping, tasks):
            tokens, worst = max(shares, key=lambda share: share[1])
            what = f"sparse takes {worst:.2f} of the dense kernel's time ({tokens} tokens)"
            return worst, f"measured in turns: {what}"
        records = [self._record(task) for task in (*skipping, *tasks)]
        pairs = zip(records, (*skipping, *tasks))
        times = [Time.of(record, task) for record, task in pairs if record]
        if len(times) == len(records) and all(times[0].comparable(time) for time in times):
            ours, theirs = _total(records[: len(tasks)]), _total(records[len(tasks) :])
            shares = {tokens: ours[tokens] / theirs[tokens] for tokens in ours if tokens in theirs}
            if shares:
                worst = max(shares, key=lambda tokens: shares[tokens])
                why = f"{_brief(ours[worst])} us, dense {_brief(theirs[worst])} ({worst} tokens)"
                how = "by llvm-mca" if records[0].estimated else "measured"
                return shares[worst], f"{how}: sparse {why}"
        share = max(relative_time(task, self.row) for task in skipping)
        return share * DOUBT, f"estimated: sparse takes {share:.2f} of the dense kernel's time"

    def _in_turns(self, skipping: Sequence[Task], tasks: Sequence[Task]) -> list[tuple[int, float]]:
        """What each sparse kernel takes as a share of the dense one's, with the tokens; empty where
        one of them was not measured in turns.
        """
        if self.log is None:
            return []
        each = [self.log.shares(*pair, self.row) for pair in zip(skipping, tasks)]
        return [share for shares in each for share in shares.items()] if all(each) else []

    def _record(self, task: Task) -> Record | None:
        return self.log.best(task, self.row) if self.log is not None else None

    def _sparsity(self, name: str) -> Sparsity:
        if name not in self._analysed:
            self._analysed[name] = analyse(self.params[name])
        return self._analysed[name]

    def _share(self, name: str, lane: int) -> float:
        if (name, lane) not in self._lanes:
            zeros = self._sparsity(name).zeros
            self._lanes[name, lane] = density(self.params[name], lane) if zeros else 1.0
        return self._lanes[name, lane]


def _total(records: Sequence[Record]) -> dict[int, float]:
    """Microseconds of all together, by the numbers of tokens that all were measured on."""
    tokens = set.intersection(*(set(record.times) for record in records))
    return {count: sum(record.times[count] for record in records) for count in sorted(tokens)}


def rounded(share: float) -> int:
    """The density of a task: percent, up to the next of DENSITIES."""
    return next(percent for percent in DENSITIES if share * 100 <= percent * NEAR)


def dense_task(task: Task, plan: LayerPlan) -> Task:
    """The task of the dense kernel that does what a "sparse" task's does."""
    shape = {key: value for key, value in task.shape.items() if key != "density"}
    if plan.bounded is not None:
        shape["precision"] = with_bounds(str(shape["precision"]))
    return Task("dense", shape)


def sparse_task(task: Task, percent: int) -> Task:
    """The task of the sparse kernel that does what a "dense" task's does."""
    shape = {**task.shape, "density": percent}
    if "precision" in shape:  # it takes bytes of any weights
        shape["precision"] = without_bounds(str(shape["precision"]))
    return Task("sparse", shape)


def report(plan: Plan) -> list[dict[str, Any]]:
    """A row per layer whose zeros were looked at, for the manifest: "layer", "precision",
    "pattern", "zeros %" of its elements, "lanes %" that are not zero, "kernel", "why".
    """
    return [
        {
            "layer": name,
            "precision": layer.precision,
            "pattern": layer.sparse.pattern,
            "zeros %": round(100 * layer.sparse.zeros, 1),
            "lanes %": round(100 * layer.sparse.lanes, 1),
            "kernel": "dense" if layer.sparse.density is None else "sparse",
            "why": layer.sparse.why or None,
        }
        for name, layer in plan.items()
        if layer.sparse is not None
    ]


def as_text(rows: Sequence[Mapping[str, Any]], sparse: str) -> str:
    """What `bertile inspect --sparse` prints of a manifest's "sparsity"; `sparse` as it was asked
    for.
    """
    if not rows:
        return f"no layer was checked for zeros: the bundle was compiled with --sparse {sparse}"
    return table(list(rows[0]), [list(row.values()) for row in rows])


def _brief(microseconds: float) -> str:
    return f"{microseconds:.1f}" if microseconds < 10 else f"{microseconds:.0f}"


def layers(forms: Forms) -> Iterator[tuple[relax.Var, str]]:
    """The variable and the weight's name of every linear layer whose weight is a parameter."""
    for binding in forms.flow.bindings:
        if name := _weight(forms.flow, binding.value):
            yield binding.var, name


def _weight(flow: Dataflow, value: Any) -> str | None:
    """The name of the weight of a linear layer; None of anything else."""
    if not ops.is_call(value, "bertile.dense"):
        return None
    weight = flow.definition(value.args[1])
    return weight.name if isinstance(weight, relax.Var) else None
