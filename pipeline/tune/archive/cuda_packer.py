"""Packs candidate kernels for a machine with a GPU that no network reaches, in a zip that Python
runs.

    __main__.py      python3 ARCHIVE --output RESULT, with numpy and the driver, nothing else
    bertile/…        what it takes of this package: the trial makes operands by seed, packs weights
                     and knows the reference, so that none of them has to travel
    manifest.json    target, tasks, candidates with their knobs
    rates.cubin      what python3 ARCHIVE --rates measures: the tensor cores by themselves
    5f0c….cubin      the code of a candidate, of several where it is the same
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from itertools import zip_longest
from pathlib import Path
from typing import Any

from bertile.base.errors import PlatformError
from bertile.base.fingerprint import closure
from bertile.base.progress import Progress
from bertile.codegen.cuda.candidates import build
from bertile.loader import available_cores
from bertile.schedules.schedule import Knobs
from bertile.schedules.task import Task
from bertile.targets.rows import Target
from bertile.tune.measure.cuda import rates
from bertile.tune.search import tuner

# What runs on the other machine: the command, the process that it starts for its trials, and the
# schedules, which are found by the kind of machine.
ROOTS = (
    "bertile.tune.measure.cuda.measure",
    "bertile.tune.measure.cuda.trial",
    "bertile.schedules.cuda",
)
MAIN = """import os
import sys

if __name__ == "__main__":
    os.environ["PYTHONPATH"] = os.path.abspath(sys.argv[0])  # of the processes that try candidates
    from bertile.tune.measure.cuda.measure import main

    sys.exit(main(sys.argv[0], sys.argv[1:]))
"""


class CudaPack:
    """Fills a directory with code, and keeps what the manifest will say."""

    def __init__(self, directory: Path, row: Target, progress: Progress, total: int) -> None:
        self._directory, self._row = directory, row
        self._progress, self._total = progress, total
        self.tasks: list[dict[str, Any]] = []
        self.candidates: list[dict[str, Any]] = []

    def add(self, task: Task, candidates: Sequence[Knobs]) -> None:
        """A task and these candidates; one that cannot be built is left out."""
        number = len(self.tasks)
        self.tasks.append({"operation": task.operation, "shape": dict(task.shape)})
        with ThreadPoolExecutor(available_cores()) as pool:
            images = pool.map(lambda knobs: self._image(task, knobs), candidates)
            for knobs, image in zip(candidates, images):
                if image is None:
                    continue
                entry = {"id": len(self.candidates), "task": number, "knobs": knobs}
                self.candidates.append({**entry, "image": image})
                text = f"{len(self.candidates)} of {self._total} candidates"
                self._progress.status(f"pack      {text}")

    def write(self, path: Path, header: dict[str, Any]) -> None:
        """The archive. The first candidate of each task comes first, then the second of each: what
        is measured before the time is up serves all of them.
        """
        by_task = [
            [candidate for candidate in self.candidates if candidate["task"] == number]
            for number in range(len(self.tasks))
        ]
        in_turn = (candidate for turn in zip_longest(*by_task) for candidate in turn if candidate)
        manifest = {
            **header,
            "blocks": [tuner.BLOCKS, *self._row.also_blocks],
            "tasks": self.tasks,
            "candidates": list(in_turn),
        }
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("__main__.py", MAIN)
            archive.writestr("manifest.json", json.dumps(manifest))
            if self._row.gpu.async_copy:  # without it, nor has it sparse products
                archive.writestr(rates.NAME, rates.build(self._row))
            for name, data in sources():
                archive.writestr(name, data)
            for file in sorted(self._directory.iterdir()):
                archive.write(file, file.name)

    def _image(self, task: Task, knobs: Knobs) -> str | None:
        """The name of the file with a candidate's code."""
        try:
            data = build(task, knobs, self._row)
        except PlatformError:
            raise  # no compiler: no candidate will do better
        except Exception as error:
            self._progress.say(f"{task.name} {knobs} cannot be built: {error}")
            return None
        name = f"{hashlib.sha256(data).hexdigest()[:32]}.cubin"
        partial = self._directory / f".{name}.{id(knobs)}"
        partial.write_bytes(data)
        os.replace(partial, self._directory / name)
        return name


def sources() -> Iterator[tuple[str, bytes]]:
    """The modules that measuring takes, none of which needs TVM, by their names in an archive."""
    for module, file in closure(*ROOTS).items():
        place = module.replace(".", "/")
        yield (
            f"{place}/__init__.py" if file.name == "__init__.py" else f"{place}.py",
            file.read_bytes(),
        )
    kernels = files("bertile.schedules.cuda")
    for file in sorted(kernels.iterdir(), key=lambda file: file.name):
        if file.name.endswith(".cuh"):
            yield f"bertile/schedules/cuda/{file.name}", file.read_bytes()
