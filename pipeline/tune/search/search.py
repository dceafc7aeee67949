"""Runs MetaSchedule's evolutionary search with its XGBoost cost model, over the knobs that a
schedule states.

A schedule of ours is a space of named knobs, not a trace of schedule primitives. So MetaSchedule
gets a
stand-in program whose only block carries one sampled annotation per knob; its search draws, mutates
and ranks
those decisions as it would any others, the cost model learns from the knobs' values, and the runner
builds
and times the real kernel that they stand for.
"""

from __future__ import annotations

import json
import logging
import random
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import tvm
from tvm import s_tir
from tvm.ir.utils import derived_object
from tvm.script import tirx as T

from bertile.base import scratch
from bertile.schedules.schedule import Knobs, Space
from bertile.schedules.task import Task

PREFIX = "bertile."
FEATURES = 96  # of a candidate: two for each knob, of which no schedule has more than 48

Candidates = Sequence[tuple[Task, Knobs]]
# → for each a list of microseconds, empty for a failed trial
Measure = Callable[[Candidates], Sequence[Sequence[float]]]


def search(
    spaces: Sequence[tuple[Task, Space, float]],
    measure: Measure,
    trials: int,
    trials_per_task: int,
    batch: int,
    seed: int,
    target: tvm.target.Target,
) -> None:
    """Spend trials on tasks (given with their spaces and weights) until they or the spaces are used
    up.

    ``batch`` trials lie between two trainings of the cost model, and are measured in one call; an
    exception that ``measure`` raises ends the search.
    """
    ms = _meta_schedule()
    tasks, weights = [], []
    for number, (task, space, weight) in enumerate(spaces):
        tasks.append(_context(ms, task, space, target, seed + number))
        weights.append(weight)
    by_key = {task.key: task for task, _, _ in spaces}
    raised: list[BaseException] = []

    def run(candidates: Sequence[tuple[str, Knobs]]) -> Sequence[Sequence[float]]:
        try:
            return measure([(by_key[key], knobs) for key, knobs in candidates])
        except BaseException as error:
            raised.append(error)  # TVM would hand on a RuntimeError in its place
            raise

    try:
        with scratch.directory("tune-") as directory:
            ms.tune.tune_tasks(
                tasks=tasks,
                task_weights=weights,
                work_dir=directory,
                max_trials_global=trials,
                max_trials_per_task=trials_per_task,
                num_trials_per_iter=batch,
                builder=_builder(ms)(),
                runner=_runner(ms, run)(),
                database=ms.database.MemoryDatabase(),
                cost_model=ms.cost_model.XGBModel(
                    extractor=_features(ms)(), num_warmup_samples=2 * batch, num_tuning_cores=1
                ),
                measure_callbacks=[
                    ms.measure_callback.UpdateCostModel(),
                    ms.measure_callback.AddToDatabase(),
                ],
                task_scheduler=ms.task_scheduler.GradientBased(seed=seed),
            )
    except Exception:
        if raised:
            raise raised[0] from None
        raise


def _meta_schedule() -> Any:
    # TuneContext imports the tensor intrinsics of every machine that TVM knows, 15 s; we use none
    # of them
    name = "tvm.s_tir.tensor_intrin"
    if name not in sys.modules:
        sys.modules[name] = s_tir.tensor_intrin = ModuleType(name)
    from tvm.s_tir import meta_schedule as ms

    logging.getLogger("tvm.s_tir.meta_schedule").setLevel(logging.ERROR)
    return ms


def _context(ms: Any, task: Task, space: Space, target: Any, seed: int) -> Any:
    def draw(sch: s_tir.Schedule) -> None:
        block = sch.get_sblock("knobs")
        for knob, choices in space.items():
            odds = [1.0 / len(choices)] * len(choices)
            sch.annotate(block, PREFIX + knob, sch.sample_categorical(list(choices), odds))

    population = int(min(256, np.prod([len(choices) for choices in space.values()])))
    return ms.TuneContext(
        mod=_stand_in(task),
        target=target,
        space_generator=ms.space_generator.ScheduleFn(
            draw, sch_rules=[], postprocs=[], mutator_probs={_mutator(ms)(seed): 1.0}
        ),
        search_strategy=ms.search_strategy.EvolutionarySearch(
            population_size=population, init_min_unmeasured=min(16, population), max_fail_count=5
        ),
        task_name=task.name,
        rand_state=seed + 1,
        num_threads=1,
        logger=logging.getLogger("tvm.s_tir.meta_schedule"),
    )


def _stand_in(task: Task) -> tvm.IRModule:
    """A program with one block named ``knobs``; the task's key keeps the workloads apart."""

    @T.prim_func(s_tir=True)
    def main(x: T.Buffer((1,), "float32")):
        with T.sblock("knobs"):
            T.reads()
            T.writes(x[0])
            x[0] = T.float32(0)

    func = main.with_attr({"global_symbol": "main", "bertile.task": task.key})
    return tvm.IRModule({"main": func})


def _knobs(mod: tvm.IRModule) -> tuple[str, Knobs]:
    """The task's key and the knobs that a candidate stands for."""
    sch = s_tir.Schedule(mod)
    notes = sch.get(sch.get_sblock("knobs")).annotations
    knobs = {k.removeprefix(PREFIX): int(v) for k, v in notes.items() if k.startswith(PREFIX)}
    return str(mod["main"].attrs["bertile.task"]), knobs


def _builder(ms: Any) -> type:
    @derived_object
    class PassOn(ms.builder.PyBuilder):
        """Nothing is built here: the runner's process builds what it times."""

        def build(self, build_inputs: Any) -> Any:
            texts = [json.dumps(_knobs(build_input.mod)) for build_input in build_inputs]
            return [ms.builder.BuilderResult(text, None) for text in texts]

    return PassOn


def _runner(
    ms: Any, measure: Callable[[Sequence[tuple[str, Knobs]]], Sequence[Sequence[float]]]
) -> type:
    @derived_object
    class Done(ms.runner.PyRunnerFuture):
        """A trial is over when it is asked for."""

        def __init__(self, result: Any) -> None:
            super().__init__()
            self._result = result

        def done(self) -> bool:
            return True

        def result(self) -> Any:
            return self._result

    @derived_object
    class Run(ms.runner.PyRunner):
        """Has the candidates of one batch timed."""

        def run(self, runner_inputs: Any) -> Any:
            candidates = [
                tuple(json.loads(str(runner_input.artifact_path))) for runner_input in runner_inputs
            ]
            return [Done(self._result(times)) for times in measure(candidates)]

        def _result(self, microseconds: Sequence[float]) -> Any:
            if not microseconds:
                return ms.runner.RunnerResult(None, "the trial failed")
            return ms.runner.RunnerResult([us * 1e-6 for us in microseconds], None)

    return Run


def _features(ms: Any) -> type:
    @derived_object
    class KnobFeatures(ms.feature_extractor.PyFeatureExtractor):
        """One row per candidate: its knobs in the order of their names, and their logarithms."""

        def extract_from(self, context: Any, candidates: Any) -> Any:
            rows = []
            for candidate in candidates:
                _, knobs = _knobs(candidate.sch.mod)
                values = np.array([knobs[name] for name in sorted(knobs)], "float32")
                row = np.concatenate([values, np.log2(1 + values)]).reshape(1, -1)
                # tasks of one run share a model: rows of equal length, the rest zero
                rows.append(np.pad(row, ((0, 0), (0, FEATURES - row.shape[1]))))
            return [tvm.runtime.tensor(row) for row in rows]

    return KnobFeatures


def _mutator(ms: Any) -> type:
    @derived_object
    class MutateKnob(ms.mutator.PyMutator):
        """Draws one knob of a candidate again."""

        def __init__(self, seed: int) -> None:
            super().__init__()
            self._random = random.Random(seed)

        def _initialize_with_tune_context(self, context: Any) -> None:
            pass

        def apply(self, trace: Any, _: Any) -> Any:
            drawn = [i for i in trace.insts if i.kind.name == "SampleCategorical"]
            drawn = [i for i in drawn if len(i.attrs[0]) > 1]
            if not drawn:
                return None
            instruction = self._random.choice(drawn)
            choice = self._random.randrange(len(instruction.attrs[0]))
            return trace.with_decision(instruction, choice, remove_postproc=True)

        def clone(self) -> Any:
            return MutateKnob(self._random.randrange(1 << 30))

    return MutateKnob
