"""Asks devices for the times of candidates, by as many processes of ``remote_trial`` (or its like)
as the tracker has devices.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Mapping, Sequence
from typing import Any

from bertile.base.errors import BertileError
from bertile.schedules.task import Task
from bertile.targets.rows import Target
from bertile.tune.measure import device
from bertile.tune.measure.trial_runner import TrialRunner

WAIT_SECONDS = 120.0  # for a device that other tuners use too
RESTART_SECONDS = 20.0  # in which a server that a candidate has ended is back


class RemoteRunner:
    """Runs trials on the devices of one key, one on each at a time. A context manager."""

    def __init__(
        self, row: Target, tracker: str, key: str, module: str, session_seconds: float
    ) -> None:
        """``module`` runs in the processes. Raises BertileError where there is no such device."""
        self._tracker, self._key = tracker, key
        self.parallel = self._devices()
        settings = (row, WAIT_SECONDS + session_seconds, (module, tracker, key))
        self._workers = [TrialRunner(*settings) for _ in range(self.parallel)]
        self._free: queue.SimpleQueue[TrialRunner] = queue.SimpleQueue()
        for worker in self._workers:
            self._free.put(worker)

    def __enter__(self) -> RemoteRunner:
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self._workers:
            worker.__exit__(*exception)

    def run(
        self,
        task: Task,
        knobs: Mapping[str, int],
        blocks: int,
        also: Sequence[int] = (),
        **more: Any,
    ) -> dict[str, Any]:
        """What the next free device says of these knobs; its death is this trial's error alone.

        Raises BertileError where no device is left.
        """
        worker = self._free.get()
        try:
            answer = worker.run(task, knobs, blocks, also, **more)
        finally:
            self._free.put(worker)
        if "error" in answer:
            self._devices(RESTART_SECONDS)
        return answer

    def _devices(self, patience: float = 0.0) -> int:
        """How many the tracker has of the key; BertileError where for so long it has none."""
        end = time.monotonic() + patience
        while True:
            fleet = {kind["key"]: kind["devices"] for kind in device.fleet(self._tracker)}
            if fleet.get(self._key):
                return fleet[self._key]
            if time.monotonic() >= end:
                break
            time.sleep(1.0)
        known = f"it has {', '.join(sorted(fleet))}" if fleet else "it has none"
        raise BertileError(
            f"the tracker at {self._tracker} has no device '{self._key}': {known}",
            f"on the device: bertile device serve --tracker {self._tracker} --key {self._key}",
        )
