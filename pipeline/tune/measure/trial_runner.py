"""Asks one process of ``trial`` (or its like) for the times of candidates, keeps it alive, and
outlives its crashes.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from bertile.base.errors import BertileError
from bertile.schedules.task import Task
from bertile.targets.rows import Target

STARTUP_SECONDS = 120.0
TRIAL_SECONDS = 20.0
# numpy's own threads spin on after the reference's products, beside the kernel that is timed next
_ALONE = {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class TrialRunner:
    """Runs trials one at a time in another process. A context manager; the process ends with it."""

    parallel = 1

    def __init__(
        self,
        row: Target,
        timeout: float = TRIAL_SECONDS,
        module: Sequence[str] = ("bertile.tune.measure.trial",),
    ) -> None:
        """``module`` is what runs in the other process, and its arguments."""
        self._row, self._timeout, self._module = row, timeout, module
        self._process: subprocess.Popen[bytes] | None = None
        self._fresh = True

    def __enter__(self) -> TrialRunner:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def run(
        self,
        task: Task,
        knobs: Mapping[str, int],
        blocks: int,
        also: Sequence[int] = (),
        **more: Any,
    ) -> dict[str, Any]:
        """What the module's ``measure`` says of these knobs, or {"error": …} for a crash."""
        return self.ask(
            {
                "operation": task.operation,
                "shape": dict(task.shape),
                "knobs": dict(knobs),
                "target": self._row.name,
                "threads": self._row.threads,
                "blocks": blocks,
                "also": list(also),
                **more,
            }
        )

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """As :meth:`run`, by the names of ``measure``'s parameters."""
        process = self._process or self._start()
        line = json.dumps(request) + "\n"
        try:
            process.stdin.write(line.encode())
            process.stdin.flush()
        except BrokenPipeError:
            return self._failed("the candidate's process ended")
        answer = self._answer(process, self._seconds())
        self._fresh = False
        return answer

    def _answer(self, process: subprocess.Popen[bytes], seconds: float) -> dict[str, Any]:
        ready, _, _ = select.select([process.stdout], [], [], seconds)
        if not ready:
            return self._failed(f"no result within {seconds:.0f} s")
        line = process.stdout.readline()
        if not line:
            code = process.wait()
            self._stop()
            if self._fresh:
                raise BertileError(
                    f"the trial process ended with code {code} before its first trial",
                    f"run `bertile doctor`, or `python -m {' '.join(self._module)}` to see why",
                )
            return {"error": f"the candidate crashed with code {code}"}
        outcome = json.loads(line)
        if outcome.pop("ended", False):  # it cannot try anything after this
            self._stop()
        return outcome

    def _seconds(self) -> float:
        """How long an answer may take; a process that has just started imports first."""
        return max(STARTUP_SECONDS, self._timeout) if self._fresh else self._timeout

    def _start(self) -> subprocess.Popen[bytes]:
        # a session of its own: Ctrl-C must reach the tuner, which then ends this process in order
        self._process = subprocess.Popen(
            [sys.executable, "-m", *self._module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, **_ALONE, "TVM_NUM_THREADS": str(self._row.threads)},
        )
        self._fresh = True
        return self._process

    def _failed(self, why: str) -> dict[str, Any]:
        self._stop()
        return {"error": why}

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
