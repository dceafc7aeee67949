"""Runs an engine in a process of its own."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from bertile.base.errors import BertileError
from bertile.bench.engines import Arrays, Engine
from bertile.bench.peers import OPENERS, Opener
from bertile.bench.timing import timed
from bertile.bench.traffic import Served, Traffic, drive


def start(engine: Engine, threads: int, cache_dir: str | None) -> Any:
    """A Worker for the engine, or what works like one for an engine that needs another Python."""
    if engine.kind != "deepsparse":
        return Worker(engine, threads)
    from bertile.bench.deepsparse import DeepSparse, environment

    return DeepSparse(engine, threads, environment(cache_dir))


class Worker:
    """An engine in a process of its own, which holds still while it is not asked.

    `opener` is a function of a module that opens the engine there, by default its kind's.
    """

    def __init__(self, engine: Engine, threads: int, opener: Opener | None = None):
        # spawned, since a forked process would inherit the parent's half of a thread pool
        context = multiprocessing.get_context("spawn")
        self.engine = engine
        self.name = engine.name
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, engine, threads, opener or OPENERS[engine.kind])
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        return int(self._process.pid or 0)

    def call(self, inputs: Arrays, count: int) -> list[float]:
        """Warm up, run `count` calls on the inputs, and give their milliseconds."""
        return self._ask("call", inputs, count)

    def outputs(self, inputs: Arrays) -> list[np.ndarray]:
        """What one call gives, which is not timed."""
        return self._ask("outputs", inputs)

    def apply(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function of a module returns there for the opened engine and these arguments."""
        return self._ask("apply", function, *arguments)

    def drive(self, requests: Sequence[Arrays], traffic: Traffic) -> Served:
        """Warm up, and send the requests as `traffic` says."""
        self.begin_drive(requests, traffic)
        return self.receive()

    def begin_drive(self, requests: Sequence[Arrays], traffic: Traffic) -> None:
        """Ask for the same without waiting; `receive` gives the answer."""
        self._pipe.send(("drive", requests, traffic))

    def cpu_seconds(self) -> float:
        """The processor time that the process has taken so far."""
        return self._ask("cpu_seconds")

    def receive(self) -> Any:
        """What the process sends next, its version at first; its error is raised here."""
        try:
            kind, value = self._pipe.recv()
        except EOFError as error:
            self._process.join(5)
            code = self._process.exitcode
            raise BertileError(f"the process of {self.name} ended with code {code}") from error
        if kind == "error":
            raise value
        return value

    def _ask(self, question: str, *arguments: Any) -> Any:
        self._pipe.send((question, *arguments))
        return self.receive()

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(2)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()


def _serve(pipe: Connection, engine: Engine, threads: int, opener: Opener) -> None:
    try:
        infer, version = opener(engine, threads)
        pipe.send(("ready", version))
        while True:
            question, *arguments = pipe.recv()
            pipe.send(("done", ANSWERS[question](infer, *arguments)))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return
    except BertileError as error:
        pipe.send(("error", error))
    except Exception as error:
        pipe.send(("error", BertileError(f"{engine.name}: {type(error).__name__}: {error}")))


ANSWERS: dict[str, Callable[..., Any]] = {
    "call": timed,
    "outputs": lambda infer, inputs: infer(inputs),
    "apply": lambda infer, function, *arguments: function(infer, *arguments),
    "drive": drive,
    "cpu_seconds": lambda infer: time.process_time(),
}
