"""Finds who answers how long a candidate takes, for a row and a configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from bertile.base.errors import PlatformError
from bertile.config import Config
from bertile.loader import cpu_features
from bertile.schedules.task import Task
from bertile.targets.rows import Target, fits
from bertile.tune.measure.trial_runner import TrialRunner


class Runner(Protocol):
    """Answers for one candidate at a time, from as many threads as ``parallel`` says.

    An answer has "microseconds" and, at other numbers of tokens, "also"; or "error". "machine", if
    there, says where it comes from.
    """

    parallel: int

    def __enter__(self) -> Runner: ...

    def __exit__(self, *exception: object) -> None: ...

    def run(
        self, task: Task, knobs: Mapping[str, int], blocks: int, also: Sequence[int] = ()
    ) -> dict[str, Any]:
        """The answer for these knobs on ``blocks`` blocks of tokens, and on others."""


def open_runner(row: Target, config: Config) -> Runner:
    """The runner that the configuration asks for, for a processor; PlatformError without one."""
    if config.runner == "mca":
        from bertile.tune.estimate.estimator import Estimator

        return Estimator(row)
    if config.rpc_tracker and config.rpc_key:
        from bertile.tune.measure.remote_runner import RemoteRunner
        from bertile.tune.measure.remote_trial import SESSION_SECONDS

        session = (
            config.rpc_tracker,
            config.rpc_key,
            "bertile.tune.measure.remote_trial",
            SESSION_SECONDS,
        )
        return RemoteRunner(row, *session)
    if not fits(row, cpu_features()):
        raise PlatformError(
            f"kernels for {row.name} cannot be measured on this machine",
            "measure on a device (--rpc-tracker, or --pack), or estimate (--runner mca)",
        )
    return TrialRunner(row)


def answers(
    runner: Runner, candidates: Sequence[tuple[Task, Any]], blocks: int, also: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Each candidate's answer, in their order; none is begun long before it is asked for.

    To be closed: what has not begun by then is left out.
    """
    if runner.parallel == 1:
        for task, knobs in candidates:
            yield runner.run(task, knobs, blocks, also)
        return
    pool = ThreadPoolExecutor(runner.parallel)
    try:
        yield from pool.map(lambda candidate: runner.run(*candidate, blocks, also), candidates)
    finally:
        pool.shutdown(cancel_futures=True)
