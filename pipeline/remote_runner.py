"""The tuner's end of ``bertile.remote_trial``: as many processes as the tracker has devices."""

from __future__ import annotations

import queue
from collections.abc import Mapping, Sequence
from typing import Any

from bertile import device
from bertile.errors import BertileError
from bertile.remote_trial import SESSION_SECONDS
from bertile.schedules.task import Task
from bertile.targets import Target
from bertile.trial_runner import TrialRunner


class RemoteRunner:
    """Runs trials on the devices of one key, one on each at a time. A context manager."""

    def __init__(self, row: Target, tracker: str, key: str) -> None:
        """Raises BertileError where the tracker has no such device."""
        fleet = {one["key"]: one["devices"] for one in device.fleet(tracker)}
        if not fleet.get(key):
            known = f"it has {', '.join(sorted(fleet))}" if fleet else "it has none"
            raise BertileError(
                f"the tracker at {tracker} has no device '{key}': {known}",
                f"on the device: bertile device serve --tracker {tracker} --key {key}",
            )
        self.parallel = fleet[key]
        module = ("bertile.remote_trial", tracker, key)
        self._workers = [
            TrialRunner(row, SESSION_SECONDS + 10, module) for _ in range(self.parallel)
        ]
        self._free: queue.SimpleQueue[TrialRunner] = queue.SimpleQueue()
        for worker in self._workers:
            self._free.put(worker)

    def __enter__(self) -> RemoteRunner:
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self._workers:
            worker.__exit__(*exception)

    def run(
        self, task: Task, knobs: Mapping[str, int], blocks: int, also: Sequence[int] = ()
    ) -> dict[str, Any]:
        """What the next free device says of these knobs; its death is this trial's error alone."""
        worker = self._free.get()
        try:
            return worker.run(task, knobs, blocks, also)
        finally:
            self._free.put(worker)
