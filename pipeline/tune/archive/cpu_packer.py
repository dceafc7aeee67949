"""Packs candidates for a processor, where `bertile-run --measure` times them.

manifest.json     target, tasks with their inputs, candidates with their knobs; one line
c12.so            a candidate, linked for its row
5f0c….bin         inputs of a task, or weights packed for a candidate: the same bytes once
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bertile.base.errors import BertileError
from bertile.base.progress import Progress
from bertile.codegen.llvm import export_kernel
from bertile.schedules import BLOCK_TOKENS, trial_sample
from bertile.schedules.cpu import SCHEDULES
from bertile.schedules.schedule import Knobs
from bertile.schedules.task import Task
from bertile.targets.rows import Target
from bertile.tune.measure.trial import ALIGNMENT, COLD_BYTES, REPEAT_SECONDS, REPEATS
from bertile.tune.search import tuner

CHECKED = tuner.BLOCKS  # blocks of tokens up to which outputs come home too


class CpuPack:
    """Fills a directory, and keeps what its manifest will say."""

    def __init__(self, directory: Path, row: Target, progress: Progress, total: int) -> None:
        self._directory, self._row = directory, row
        self._progress, self._total = progress, total
        self.tasks: list[dict[str, Any]] = []
        self.candidates: list[dict[str, Any]] = []

    def add(self, task: Task, candidates: Sequence[Knobs]) -> None:
        """A task with its inputs, and these candidates; one that cannot be built is left out."""
        schedule, number = SCHEDULES[task.operation], len(self.tasks)
        counts = sorted({1, tuner.BLOCKS, *self._row.also_blocks})
        samples = {blocks: trial_sample(task, blocks, self._row) for blocks in counts}
        sets = []
        for blocks, sample in samples.items():
            file, inputs = self._write(sample.activations)
            results = [_describe(array) for array in sample.buffers()]
            tokens, check = blocks * BLOCK_TOKENS, int(blocks <= CHECKED)
            sets.append({"tokens": tokens, "check": check, "file": file, "inputs": inputs})
            sets[-1]["results"] = results
        self.tasks.append({"operation": task.operation, "shape": dict(task.shape), "sets": sets})
        for knobs in candidates:
            name = f"c{len(self.candidates)}.so"
            try:
                kernel = schedule.kernel(task, knobs, self._row)
                export_kernel(kernel, self._row, self._directory / name)
            except BertileError:
                raise  # no linker: no candidate will do better
            except Exception as error:
                self._progress.say(f"{task.name} {knobs} cannot be built: {error}")
                continue
            packed = schedule.pack(task, knobs, samples[counts[0]].weights, self._row)
            file, arrays = self._write(packed)
            entry = {"id": len(self.candidates), "task": number, "knobs": knobs, "library": name}
            self.candidates.append({**entry, "weights": {"file": file, "arrays": arrays}})
            self._progress.status(f"pack      {len(self.candidates)} of {self._total} candidates")

    def write(self, path: Path, header: dict[str, Any]) -> None:
        """The archive, with a manifest of what the device and the way home need to know."""
        manifest = {
            **header,
            "repeats": REPEATS,
            "repeat_ms": round(REPEAT_SECONDS * 1000),
            "cold_bytes": COLD_BYTES,
            "tasks": self.tasks,
            "candidates": self.candidates,
        }
        text = json.dumps(manifest)
        (self._directory / "manifest.json").write_text(text, encoding="utf-8")
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
            for file in sorted(self._directory.iterdir()):
                archive.add(file, arcname=file.name)

    def _write(self, arrays: Sequence[np.ndarray]) -> tuple[str, list[dict[str, Any]]]:
        """The name of a file with these arrays, and where they lie in it."""
        described, parts, at = [], [], 0
        for array in arrays:
            data = np.ascontiguousarray(array).tobytes()
            described.append({**_describe(array), "offset": at})
            parts.append(data + bytes(-len(data) % ALIGNMENT))
            at += len(parts[-1])
        data = b"".join(parts)
        name = f"{hashlib.sha256(data).hexdigest()[:32]}.bin"
        if not (self._directory / name).exists():
            (self._directory / name).write_bytes(data)
        return name, described


def _describe(array: np.ndarray) -> dict[str, Any]:
    return {"dtype": str(array.dtype), "shape": list(array.shape)}
