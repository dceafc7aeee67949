"""A bundle, or the model it came from, comes in; a process that runs it in one engine and times its
calls goes out.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from bertile.errors import BertileError, require

# Before what is measured: the caches and threads that the engine before has taken are won back.
WARM_UP_CALLS = 3
WARM_UP_SECONDS = 0.05
WARM_UP_LIMIT = 50

Arrays = dict[str, np.ndarray]
Infer = Callable[[Arrays], list[np.ndarray]]


@dataclass(frozen=True)
class Source:
    """Where an engine finds the model: all three are the same weights."""

    bundle: Path
    onnx: Path | None = None  # the canonical ONNX file
    model: str = ""  # what the user called MODEL
    head: str | None = None  # as the manifest says it
    outputs: tuple[str, ...] = ()


class Worker:
    """An engine in a process of its own, which holds still while it is not asked."""

    def __init__(self, name: str, source: Source, threads: int):
        # spawned, since a forked process would inherit the parent's half of a thread pool
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, name, source, threads), daemon=True
        )
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        return int(self._process.pid or 0)

    def call(self, inputs: Arrays, count: int) -> list[float]:
        """Warm up, run `count` calls on the inputs, and give their milliseconds."""
        self._pipe.send((inputs, count))
        return self.receive()

    def outputs(self, inputs: Arrays) -> list[np.ndarray]:
        """What one call gives, which is not timed."""
        self._pipe.send((inputs, 0))
        return self.receive()

    def receive(self) -> Any:
        """What the process sends next; its error is raised here."""
        try:
            kind, value = self._pipe.recv()
        except EOFError as error:
            self._process.join(5)
            code = self._process.exitcode
            raise BertileError(f"the process of {self.name} ended with code {code}") from error
        if kind == "error":
            raise value
        return value

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(2)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()


def timed(infer: Infer, inputs: Arrays, count: int) -> list[float]:
    """Milliseconds of `count` calls behind a warm-up of some calls and some time."""
    began = time.perf_counter()
    for done in range(WARM_UP_LIMIT):
        if done >= WARM_UP_CALLS and time.perf_counter() - began >= WARM_UP_SECONDS:
            break
        infer(inputs)
    times = []
    for _ in range(count):
        began = time.perf_counter()
        infer(inputs)
        times.append((time.perf_counter() - began) * 1e3)
    return times


def _serve(pipe: Connection, name: str, source: Source, threads: int) -> None:
    try:
        infer, version = ENGINES[name](source, threads)
        pipe.send(("ready", version))
        while True:
            inputs, count = pipe.recv()
            found = timed(infer, inputs, count) if count else infer(inputs)
            pipe.send(("done", found))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return
    except BertileError as error:
        pipe.send(("error", error))
    except Exception as error:
        pipe.send(("error", BertileError(f"{name}: {type(error).__name__}: {error}")))


def _bertile(source: Source, threads: int) -> tuple[Infer, str]:
    import bertile
    from bertile import loader

    model = loader.load(source.bundle, threads)
    return lambda inputs: list(model(**inputs).values()), f"Bertile {bertile.__version__}"


def _onnxruntime(source: Source, threads: int) -> tuple[Infer, str]:
    (ort,) = require("bench", "onnxruntime")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = ort.InferenceSession(str(source.onnx), options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs), f"ONNX Runtime {ort.__version__}"


def _openvino(source: Source, threads: int) -> tuple[Infer, str]:
    (openvino,) = require("bench", "openvino")
    # float32, since on a CPU with bf16 it would otherwise compute in that
    config = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    model = openvino.Core().compile_model(str(source.onnx), "CPU", config)
    request = model.create_infer_request()

    def infer(inputs: Arrays) -> list[np.ndarray]:
        results = request.infer(inputs, share_inputs=True)
        return [results[port] for port in model.outputs]

    return infer, f"OpenVINO {openvino.__version__.partition('-')[0]}"


def _torch(source: Source, threads: int) -> tuple[Infer, str]:
    torch, _ = require("export", "torch", "transformers")
    from bertile import models
    from bertile.exportable import pool

    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)
    checkpoint = models.load(source.model, source.head)
    model = checkpoint.model
    with models.quiet(), contextlib.suppress(ValueError, ImportError):
        model.set_attn_implementation("sdpa")  # a family without it keeps what it has
    if source.head == "embedding" and hasattr(model, "pooler"):
        model.pooler = None  # nobody reads it

    def infer(inputs: Arrays) -> list[np.ndarray]:
        with torch.inference_mode():
            given = {name: torch.from_numpy(array) for name, array in inputs.items()}
            found = model(**given)
            if checkpoint.pooling is None:
                return [found[name].numpy() for name in source.outputs]
            mask = given["attention_mask"].float()
            return [pool(found.last_hidden_state, mask, checkpoint.pooling).numpy()]

    return infer, f"PyTorch {torch.__version__.partition('+')[0]}"


PEERS = {"onnxruntime": _onnxruntime, "openvino": _openvino, "torch": _torch}
ENGINES = {"bertile": _bertile, **PEERS}
