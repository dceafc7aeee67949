"""Runs a model in DeepSparse, in a virtual environment of its own.

DeepSparse is closed source, and its last release wants Python 3.11 and a numpy before 2.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from bertile.base import scratch
from bertile.base.cache import Cache
from bertile.base.progress import Progress
from bertile.bench import deepsparse_server
from bertile.bench.engines import Arrays, Engine, LeftOut

VERSION = "1.8.0"
PACKAGES = (f"deepsparse=={VERSION}", "numpy==1.26.4")
PYTHON = (3, 11)


def environment(cache_dir: str | None, progress: Progress | None = None) -> Path:
    """The Python that has DeepSparse; made in the cache directory at its first use.

    Raises LeftOut where it cannot be installed.
    """
    directory = Cache(cache_dir).directory / f"deepsparse-{VERSION}"
    python = directory / "bin" / "python"
    if python.exists():
        os.utime(directory)  # what was used long ago is pruned
        return python
    if progress:
        progress.say(f"bench     DeepSparse {VERSION} is installed into {directory}, once")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with scratch.held(directory.parent, ".deepsparse-") as beside:
        fresh = Path(beside) / "made"
        _run(_base_python(), "-m", "venv", str(fresh))
        _run(str(fresh / "bin" / "python"), "-m", "pip", "install", "--quiet", *PACKAGES)
        if not directory.exists():  # another process may have been first
            fresh.rename(directory)
    return python


class DeepSparse:
    """Works like `engines.Worker`; whatever goes wrong in there is a LeftOut."""

    def __init__(self, engine: Engine, threads: int, python: Path) -> None:
        self.engine, self.name = engine, engine.name
        # -I: nothing of this process's environment or of the script's directory is imported
        line = [str(python), "-I", deepsparse_server.__file__, str(engine.source.onnx)]
        self._process: Any = subprocess.Popen(
            [*line, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    def call(self, inputs: Arrays, count: int) -> list[float]:
        """Warm up, run `count` calls on the inputs, and give their milliseconds."""
        self._send(inputs, count)
        return self.receive()

    def outputs(self, inputs: Arrays) -> list[np.ndarray]:
        """What one call gives, which is not timed; compiles for a size not seen before."""
        self._send(inputs, 0)
        return self.receive()

    def receive(self) -> Any:
        """What the process sends next, its version at first."""
        try:
            header, arrays = deepsparse_server.read(self._process.stdout)
        except EOFError as error:
            raise self._ended() from error
        if header["kind"] == "error":
            raise LeftOut(f"{self.name} is left out: {header['value']}")
        return list(arrays.values()) if header["kind"] == "outputs" else header["value"]

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _send(self, inputs: Arrays, count: int) -> None:
        try:
            deepsparse_server.write(self._process.stdin, {"count": count}, inputs)
        except BrokenPipeError as error:
            raise self._ended() from error

    def _ended(self) -> LeftOut:
        return LeftOut(
            f"{self.name} is left out: its process ended with code {self._process.wait()}"
        )


def _base_python() -> str:
    """A Python that DeepSparse has been built for."""
    name = ".".join(map(str, PYTHON))
    python = sys.executable if sys.version_info[:2] == PYTHON else shutil.which(f"python{name}")
    if python is None:
        raise LeftOut(f"deepsparse is left out: it needs Python {name}, which is not installed")
    return python


def _run(*line: str) -> None:
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise LeftOut(f"deepsparse is left out: it cannot be installed: {reason}")
