"""The tuner's way to this machine's GPU: kernels are compiled side by side, and tried one at a time
in another process.
"""

from __future__ import annotations

import itertools
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bertile.cuda.candidates import build
from bertile.cuda.card import Card
from bertile.cuda.measure import TRIAL_SECONDS
from bertile.cuda.trial import check
from bertile.errors import PlatformError
from bertile.loader import available_cores
from bertile.schedules.task import Task
from bertile.targets import Target
from bertile.trial_runner import TrialRunner


class CudaRunner:
    """Runs trials on the first GPU of this machine. A context manager."""

    def __init__(self, row: Target) -> None:
        """Raises PlatformError where there is no such GPU."""
        try:
            check(Card(), row)
        except PlatformError as error:
            raise PlatformError(
                f"kernels for {row.name} cannot be measured on this machine: {error.what}",
                f"tune where there is such a GPU, or carry candidates to it:"
                f" bertile tune MODEL --target {row.name} --pack FILE",
            ) from error
        self.parallel = available_cores()
        self._row, self._numbers = row, itertools.count()
        self._trials = TrialRunner(row, TRIAL_SECONDS, ("bertile.cuda.trial",))
        self._one_at_a_time = threading.Lock()
        self._place = tempfile.TemporaryDirectory(prefix="bertile-tune-")

    def __enter__(self) -> CudaRunner:
        return self

    def __exit__(self, *exception: object) -> None:
        self._trials.__exit__(*exception)
        self._place.cleanup()

    def run(
        self, task: Task, knobs: Mapping[str, int], blocks: int, also: Sequence[int] = ()
    ) -> dict[str, Any]:
        """What ``bertile.cuda.trial.measure`` says of these knobs."""
        path = Path(self._place.name) / f"{next(self._numbers)}.cubin"
        try:
            path.write_bytes(build(task, knobs, self._row))
        except PlatformError:
            raise  # no compiler: no candidate will do better
        except Exception as error:  # a candidate that cannot be built is its own result
            return {"error": f"{type(error).__name__}: {str(error).strip()[-300:]}"}
        try:
            with self._one_at_a_time:
                return self._trials.run(task, knobs, blocks, also, image=str(path))
        finally:
            path.unlink()
