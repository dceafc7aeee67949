"""Requests on stdin come in, answers on stdout go out: DeepSparse in a Python of its own.

Run by path in an environment that has DeepSparse and no Bertile, so it imports nothing of that. A
message is a line of JSON, whose "bytes" say how long the .npz behind it is.
"""

from __future__ import annotations

import io
import json
import os
import runpy
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np


def write(stream, header: dict, arrays: dict | None = None) -> None:
    """Send one message."""
    packed = io.BytesIO()
    np.savez(packed, **(arrays or {}))
    data = packed.getvalue()
    stream.write(json.dumps({**header, "bytes": len(data)}).encode() + b"\n" + data)
    stream.flush()


def read(stream) -> tuple[dict, dict]:
    """Receive one message; EOFError where the other side has ended."""
    line = stream.readline()
    if not line:
        raise EOFError
    header = json.loads(line)
    with np.load(io.BytesIO(stream.read(header["bytes"]))) as file:
        return header, dict(file)


class Model:
    """A model for one size of input after the other: DeepSparse compiles for fixed shapes."""

    def __init__(self, path: Path, threads: int) -> None:
        self._path, self._threads = path, threads
        self._shape: tuple[int, ...] = ()
        self._engine = None

    def __call__(self, inputs: dict) -> list:
        return self._engine.run([inputs[name] for name in self._engine.input_names])

    def compile(self, inputs: dict) -> None:
        """Make the engine for the shape of these inputs, unless it is there."""
        import deepsparse

        shape = next(iter(inputs.values())).shape
        if shape == self._shape:
            return
        # a copy, since DeepSparse writes the shape into the file that it is given
        with tempfile.TemporaryDirectory(prefix="bertile-deepsparse-") as directory:
            copy = shutil.copy(self._path, directory)
            self._engine = deepsparse.Engine(
                copy,
                batch_size=shape[0],
                num_cores=self._threads,
                input_shapes=[list(shape)] * len(inputs),
            )
        self._shape = shape


def main(path: str, threads: str) -> None:
    """Answer requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what DeepSparse prints is no answer
    try:
        timed = runpy.run_path(str(Path(__file__).with_name("timing.py")))["timed"]
        import deepsparse

        model = Model(Path(path), int(threads))
        write(answers, {"kind": "ready", "value": f"DeepSparse {deepsparse.__version__}"})
        while True:
            header, inputs = read(sys.stdin.buffer)
            model.compile(inputs)
            if header["count"]:
                times = timed(model, inputs, header["count"])
                write(answers, {"kind": "times", "value": times})
            else:
                outputs = {f"output{n:03}": array for n, array in enumerate(model(inputs))}
                write(answers, {"kind": "outputs"}, outputs)
    except (EOFError, BrokenPipeError):
        return
    except Exception as error:
        write(answers, {"kind": "error", "value": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main(*sys.argv[1:])
