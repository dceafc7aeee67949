"""A bundle and other engines come in; their times, measured in turn in one run, go out."""

from __future__ import annotations

import multiprocessing
import platform
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Callable

import numpy as np

from bertile import loader
from bertile.errors import BertileError, UsageError, nearest
from bertile.progress import Progress
from bertile.runner import max_tokens
from bertile.tables import table

# Calls that one engine makes before it is the other's turn: enough to warm its threads and caches
# again, few enough that both see the same weather on a shared machine.
TURN = 5
WARM_UP = 2

Infer = Callable[[dict[str, np.ndarray]], list[np.ndarray]]


def bench(
    directory: Path,
    onnx: Path | None = None,
    *,
    against: Sequence[str] = ("onnxruntime",),
    batches: Sequence[int] = (1,),
    lengths: Sequence[int] = (128,),
    threads: int | None = None,
    repeat: int = 30,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time the bundle and each engine of `against` on the same random ids, without padding.

    Each engine has a process of its own with `threads` cores, and they work in turns of some
    calls; times are milliseconds per call. `onnx` None exports the bundle's source again, from
    the cache where it can. Gives "rows", one per engine and size, with the ratio of its median to
    the bundle's and the greatest difference of its outputs.
    """
    against = [name for name in against if name != "none"]
    counts = {"batch": batches, "length": lengths, "repeat": [repeat]}
    _check(against, counts | ({} if threads is None else {"threads": [threads]}))
    progress = progress or Progress(verbosity=-1)
    manifest = loader.read_manifest(directory)
    threads = threads or loader.available_cores()
    paths = {"bertile": Path(directory)}
    if against:
        peer = onnx or _exported(manifest)
        paths.update({name: Path(peer) for name in against})
    workers = [Worker(name, path, threads) for name, path in paths.items()]
    try:
        versions = {worker.name: worker.receive() for worker in workers}
        rows = []
        for batch in batches:
            for length in lengths:
                inputs = random_inputs(manifest, batch, length)
                rows += _measure(workers, inputs, repeat, progress)
    finally:
        for worker in workers:
            worker.close()
    facts = {"threads": threads, "repeat": repeat, "machine": platform.machine()}
    return {**facts, "versions": versions, "source": manifest["model"]["source"], "rows": rows}


def as_table(report: dict[str, Any], markdown: bool = False) -> str:
    """The rows of a report for a terminal or for Markdown."""
    header = ("engine", "batch", "length", "median ms", "p90 ms", "tokens/s", "x bertile")
    rows = [
        (
            report["versions"][row["engine"]],
            row["batch"],
            row["length"],
            row["median_ms"],
            row["p90_ms"],
            round(row["batch"] * row["length"] / row["median_ms"] * 1e3),
            row["ratio"],
        )
        for row in report["rows"]
    ]
    return f"{table(header, rows, markdown)}\n\n{report['source']}, {report['threads']} threads"


def random_inputs(manifest: dict[str, Any], batch: int, length: int) -> dict[str, np.ndarray]:
    """Seeded ids for every input of the manifest; no padding, as a full batch has none."""
    limit = max_tokens(manifest)
    if limit and length > limit:
        raise UsageError(f"length {length} is too much", f"the model takes at most {limit} tokens")
    random = np.random.default_rng(batch * 100003 + length)
    inputs = {}
    for spec in manifest["inputs"]:
        if spec["default"] is None:
            values = random.integers(0, spec["below"] or 2, (batch, length))
        else:
            values = np.full((batch, length), int(spec["default"] == "ones"))
        inputs[spec["name"]] = values.astype(spec["dtype"])
    return inputs


class Worker:
    """An engine in a process of its own, which holds still while it is not asked."""

    def __init__(self, name: str, path: Path, threads: int):
        # spawned, since a forked process would inherit the parent's half of a thread pool
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, name, path, threads), daemon=True
        )
        self._process.start()
        theirs.close()

    def call(self, inputs: dict[str, np.ndarray], count: int) -> tuple[list[float], Any]:
        """Run `count` calls on the inputs; their milliseconds, and the outputs of the last."""
        self._pipe.send((inputs, count))
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


def _check(against: Sequence[str], counts: dict[str, Sequence[int]]) -> None:
    for name in against:
        if name not in PEERS:
            raise UsageError(f"engine '{name}' is unknown{nearest(name, (*PEERS, 'none'))}")
    for what, values in counts.items():
        for value in values:
            if value < 1:
                raise UsageError(f"{what} is {value}", "give a number above 0")


def _exported(manifest: dict[str, Any]) -> Path:
    from bertile import driver
    from bertile.config import Config

    config = Config.from_dict(manifest["config"])
    return driver.export_cached(manifest["model"]["source"], config).onnx_path


def _measure(
    workers: list[Worker], inputs: dict[str, np.ndarray], repeat: int, progress: Progress
) -> list[dict[str, Any]]:
    batch, length = next(iter(inputs.values())).shape
    times: dict[str, list[float]] = {worker.name: [] for worker in workers}
    outputs = {}
    for done in range(0, repeat, TURN):
        progress.status(f"bench     {batch} x {length} tokens, call {done} of {repeat}")
        for worker in workers:
            count = min(TURN, repeat - done)
            found, outputs[worker.name] = worker.call(inputs, WARM_UP + count)
            times[worker.name] += found[WARM_UP:]
    first = float(np.median(times["bertile"]))
    return [
        {
            "engine": name,
            "batch": batch,
            "length": length,
            "median_ms": float(np.median(found)),
            "p90_ms": float(np.quantile(found, 0.9)),
            "ratio": float(np.median(found)) / first,
            "max_abs_difference": _difference(outputs["bertile"], outputs[name]),
        }
        for name, found in times.items()
    ]


def _difference(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs))


def _serve(pipe: Connection, name: str, path: Path, threads: int) -> None:
    try:
        infer, version = ENGINES[name](path, threads)
        pipe.send(("ready", version))
        while True:
            inputs, count = pipe.recv()
            times, outputs = [], []
            for _ in range(count):
                began = time.perf_counter()
                outputs = infer(inputs)
                times.append((time.perf_counter() - began) * 1e3)
            pipe.send(("done", (times, outputs)))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return
    except BertileError as error:
        pipe.send(("error", error))
    except Exception as error:
        pipe.send(("error", BertileError(f"{name}: {type(error).__name__}: {error}")))


def _bertile(path: Path, threads: int) -> tuple[Infer, str]:
    model = loader.load(path, threads)
    return lambda inputs: list(model(**inputs).values()), "Bertile"


def _onnxruntime(path: Path, threads: int) -> tuple[Infer, str]:
    from bertile.errors import require

    (ort,) = require("bench", "onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs), f"ONNX Runtime {ort.__version__}"


def _openvino(path: Path, threads: int) -> tuple[Infer, str]:
    from bertile.errors import require

    (openvino,) = require("bench", "openvino")
    # float32, since on a CPU with bf16 it would otherwise compute in that
    config = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    model = openvino.Core().compile_model(str(path), "CPU", config)

    def infer(inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        results = model(inputs)
        return [results[port] for port in model.outputs]

    return infer, f"OpenVINO {openvino.__version__.partition('-')[0]}"


PEERS = {"onnxruntime": _onnxruntime, "openvino": _openvino}
ENGINES = {"bertile": _bertile, **PEERS}
