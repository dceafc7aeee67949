"""Tries candidates on a GPU of this machine, or on those of a tracker's devices: kernels are
compiled here side by side, and tried one at a time on each GPU.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from bertile.base import scratch
from bertile.base.errors import PlatformError, UsageError
from bertile.codegen.cuda.candidates import build
from bertile.config import Config
from bertile.loader import available_cores
from bertile.schedules.task import Task
from bertile.targets.rows import Target
from bertile.tune.measure.cuda.card import Card
from bertile.tune.measure.cuda.measure import TRIAL_SECONDS
from bertile.tune.measure.cuda.remote_trial import SESSION_SECONDS
from bertile.tune.measure.cuda.trial import check
from bertile.tune.measure.remote_runner import RemoteRunner
from bertile.tune.measure.trial_runner import TrialRunner


class CudaRunner:
    """Compiles candidates for ``trials``, which runs them. A context manager."""

    def __init__(self, row: Target, trials: TrialRunner | RemoteRunner) -> None:
        self.parallel = available_cores() + trials.parallel - 1
        self._row, self._numbers = row, itertools.count()
        self._trials, self._turns = trials, threading.Semaphore(trials.parallel)
        self._until_exit = contextlib.ExitStack()
        self._place = self._until_exit.enter_context(scratch.directory("tune-"))

    def __enter__(self) -> CudaRunner:
        return self

    def __exit__(self, *exception: object) -> None:
        self._trials.__exit__(*exception)
        self._until_exit.close()

    def run(
        self, task: Task, knobs: Mapping[str, int], blocks: int, also: Sequence[int] = ()
    ) -> dict[str, Any]:
        """What ``bertile.tune.measure.cuda.trial.measure`` says of these knobs."""
        path = self._place / f"{next(self._numbers)}.cubin"
        try:
            path.write_bytes(build(task, knobs, self._row))
        except PlatformError:
            raise  # no compiler: no candidate will do better
        except Exception as error:  # a candidate that cannot be built is its own result
            return {"error": f"{type(error).__name__}: {str(error).strip()[-300:]}"}
        try:
            with self._turns:
                return self._trials.run(task, knobs, blocks, also, image=str(path))
        finally:
            path.unlink()


def local(row: Target) -> TrialRunner:
    """Trials on the first GPU of this machine; PlatformError where there is no such GPU."""
    try:
        check(Card(), row)
    except PlatformError as error:
        raise PlatformError(
            f"kernels for {row.name} cannot be measured on this machine: {error.what}",
            f"tune where there is such a GPU (--rpc-tracker), or carry candidates to it:"
            f" bertile tune MODEL --target {row.name} --pack FILE",
        ) from error
    return TrialRunner(row, TRIAL_SECONDS, ("bertile.tune.measure.cuda.trial",))


def remote(row: Target, tracker: str, key: str) -> RemoteRunner:
    """Trials on the GPUs of a tracker's devices; BertileError where it has none of the key."""
    return RemoteRunner(
        row, tracker, key, "bertile.tune.measure.cuda.remote_trial", SESSION_SECONDS
    )


def open_runner(row: Target, config: Config) -> CudaRunner:
    """The runner for a GPU that the configuration asks for; PlatformError where it cannot work."""
    if config.runner == "mca":
        raise UsageError(f"llvm-mca has no model of {row.name}", "tune on a GPU, or with --pack")
    if config.rpc_tracker and config.rpc_key:
        return CudaRunner(row, remote(row, config.rpc_tracker, config.rpc_key))
    return CudaRunner(row, local(row))
