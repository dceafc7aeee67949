"""Reads what a device wrote of an archive (`bertile-run --measure`, or a GPU's archive itself) into
the tuning log.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bertile.base.errors import UsageError
from bertile.base.progress import Progress
from bertile.schedules import BLOCK_TOKENS, trial_sample
from bertile.schedules.task import Task
from bertile.targets.rows import resolve
from bertile.tune.log.log_commands import usable
from bertile.tune.log.tuning_log import Record, TuningLog
from bertile.tune.search.tuner import BLOCKS

SCHEMA = 1


def ingest(path: Path, log: TuningLog, progress: Progress) -> dict[str, Any]:
    """Append what the result says of its candidates to the user's log, each compared with the
    reference first (a GPU's were, where they ran); what the log has already is left out, so that a
    file may be read twice.
    """
    lines = _lines(path, progress)
    header = next(lines, {})
    if header.get("schema") != SCHEMA or not isinstance(header.get("pack"), dict):
        raise UsageError(
            f"'{path}' is not a result of bertile-run --measure",
            "give the file that its --output wrote",
        )
    result = _Result(header, list(lines))
    counts = {"added": 0, "known": 0, "failed": 0}
    known = {record.to_line() for record in log.all_records(result.log)}
    for record in result.records():
        if record.to_line() in known:
            counts["known"] += 1
            continue
        log.append(record)
        counts["added"] += 1
        counts["failed"] += not record.microseconds
    return {"log": str(log.directories[-1]), "device": result.device, **counts}


class _Result:
    """A device's answers to one archive."""

    def __init__(self, header: Mapping[str, Any], lines: list[dict[str, Any]]) -> None:
        self._pack, self._time = header["pack"], header["time"]
        self.log: str = self._pack["log"]
        self._row = resolve(self._pack["target"]["name"], self._pack["threads"])
        self.machine = {**header["machine"], "row": self._pack["target"]["name"]}
        self.device = self.machine.get("gpu") or self.machine["cpu"]
        self._outputs = {line["output"]: line["base64"] for line in lines if "output" in line}
        self._answers = {line["candidate"]: line for line in lines if "candidate" in line}
        self._verdicts: dict[tuple[int, int, str], str | None] = {}

    def records(self) -> Iterator[Record]:
        """One of each candidate that was run."""
        for candidate in self._pack["candidates"]:
            answer = self._answers.get(candidate["id"])
            if answer is not None:
                yield usable(self._record(candidate, answer).to_line())

    def _record(self, candidate: Mapping[str, Any], answer: Mapping[str, Any]) -> Record:
        task = Task(**{name: self._task(candidate)[name] for name in ("operation", "shape")})
        error, times = answer.get("error"), {}
        for measured in answer.get("sets", ()):
            error = error or self._mistake(candidate, measured)
            times[measured["tokens"]] = tuple(measured["microseconds"])
        tokens = BLOCKS * BLOCK_TOKENS
        error = error or (None if tokens in times else "the device gave no time")
        return Record(
            operation=task.operation,
            shape=dict(task.shape),
            target=self.log,
            threads=self._pack["threads"],
            tokens=tokens,
            dtype=str(task.shape.get("precision", "float32")),
            knobs=candidate["knobs"],
            microseconds=() if error else times.pop(tokens),
            also={} if error else {str(count): repeats for count, repeats in times.items()},
            machine=self.machine,
            versions=self._pack["versions"],
            time=self._time,
            error=error,
        )

    def _task(self, candidate: Mapping[str, Any]) -> dict[str, Any]:
        return self._pack["tasks"][candidate["task"]]

    def _mistake(self, candidate: Mapping[str, Any], measured: Mapping[str, Any]) -> str | None:
        """What is wrong with a candidate's output, which most share with others of their task."""
        digest = measured.get("output")
        key = (candidate["task"], measured["tokens"], digest)
        if digest and key not in self._verdicts:
            self._verdicts[key] = self._verdict(self._task(candidate), measured["tokens"], digest)
        return self._verdicts.get(key)

    def _verdict(self, task: Mapping[str, Any], tokens: int, digest: str) -> str | None:
        data = base64.b64decode(self._outputs.get(digest, ""))
        if hashlib.sha256(data).hexdigest() != digest:
            return "the output that the device wrote is damaged"
        described = next(entry["results"] for entry in task["sets"] if entry["tokens"] == tokens)
        results, at = [], 0
        for result in described:
            kind = np.dtype(result["dtype"])
            count = int(np.prod(result["shape"]))
            results.append(np.frombuffer(data, kind, count, at).reshape(result["shape"]))
            at += count * kind.itemsize
        kernel_task = Task(task["operation"], task["shape"])
        mistake = trial_sample(kernel_task, tokens // BLOCK_TOKENS, self._row).mistake(results)
        return f"{mistake} on {tokens // BLOCK_TOKENS} blocks" if mistake else None


def _lines(path: Path, progress: Progress) -> Iterator[dict[str, Any]]:
    bad = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except ValueError:
                bad.append(number)  # a candidate was ended while it wrote
                continue
            if isinstance(entry, dict):
                yield entry
    if bad:
        progress.say(f"{path}: line {', '.join(map(str, bad))} is cut off and is skipped")
