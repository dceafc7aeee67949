"""Bundles for a GPU and the same model in PyTorch, timed in turns on one GPU; a result
for ``cuda_package`` to make a table of goes out.

    python3 cuda_bench.py --fp16 BUNDLE --int8 BUNDLE --model DIR -o RESULT.json

One file on numpy, torch and transformers, that needs nothing of ours but what bundles hold with
their runtime, so that it can be carried to a machine with them. Times are of the GPU, by
events before and behind each call; beside them, of calls that are waited for, on tensors that are
on the GPU. Copies of inputs and outputs are in none of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

ROUNDS, CALLS, WARM = 10, 20, 10  # every engine's turn is CALLS calls, and it has ROUNDS turns
SEED = 7
STARTS = 5  # processes that are timed from their start to their first result


@dataclass(frozen=True)
class Case:
    """A request. ``ragged``: lengths from 8 to the length, which a peer computes padded. ``limit``
    is what it may take, of the fastest peer's time.
    """

    name: str
    batch: int
    precision: str = "fp16"
    length: int = 128
    ragged: bool = False
    limit: float = 1.0


CASES = (
    Case("batch 1", 1, limit=0.7),
    Case("batch 8", 8, limit=0.9),
    Case("batch 32", 32),
    Case("batch 32, lengths 8-128", 32, ragged=True, limit=0.6),
    Case("batch 32, int8", 32, "int8", limit=0.8),
)


def inputs(case: Case, vocabulary: int) -> dict[str, np.ndarray]:
    """Random ids; the mask where lengths differ."""
    draw = np.random.default_rng(SEED)
    ids = draw.integers(1, vocabulary, (case.batch, case.length), dtype=np.int64)
    if not case.ragged:
        return {"input_ids": ids}
    lengths = draw.permutation(np.linspace(8, case.length, case.batch).round().astype(int))
    mask = (np.arange(case.length) < lengths[:, None]).astype(np.int64)
    return {"input_ids": ids * mask, "attention_mask": mask}


class Bundle:
    """A compiled model."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self._model = _loader(directory).load(directory)

    def output(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        """The first output."""
        return next(iter(self._model(**arrays).values()))

    def milliseconds(self, arrays: dict[str, np.ndarray], calls: int) -> list[float]:
        """Of each call."""
        if hasattr(self._model, "time"):
            return [
                float(milliseconds)
                for milliseconds in self._model.time(repeats=calls, warm=WARM, **arrays)
            ]
        return _timed("cpu", lambda: self._model(**arrays), calls)

    def waited(self, arrays: dict[str, np.ndarray], device: str, calls: int) -> list[float]:
        """Of calls that are waited for; none with a mask: what is on a GPU is not packed."""
        if "attention_mask" in arrays:
            return []
        tensors = _tensors(arrays, device) if device == "cuda" else arrays
        return _waited(device, lambda: self._model(**tensors), calls)


class Peer:
    """The model in PyTorch: eager, or compiled with its best effort, which captures CUDA graphs."""

    def __init__(self, name: str, directory: Path, device: str, dtype: str, compiled: bool) -> None:
        model = transformers.AutoModel.from_pretrained(
            directory,
            dtype=getattr(torch, dtype),
            attn_implementation="sdpa",
            add_pooling_layer=False,
        )
        self._model, self._device = model.to(device).eval(), device
        if compiled:
            self._model = torch.compile(self._model, mode="max-autotune", dynamic=False)
        self.name = name

    def output(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        """The hidden states of the last layer."""
        return self._call(_tensors(arrays, self._device)).float().cpu().numpy()

    def milliseconds(self, arrays: dict[str, np.ndarray], calls: int) -> list[float]:
        """Of each call, on tensors that are on the device."""
        tensors = _tensors(arrays, self._device)
        return _timed(self._device, lambda: self._call(tensors), calls)

    def waited(self, arrays: dict[str, np.ndarray], device: str, calls: int) -> list[float]:
        """Of calls that are waited for."""
        tensors = _tensors(arrays, device)
        return _waited(device, lambda: self._call(tensors), calls)

    def _call(self, tensors: dict[str, Any]) -> Any:
        with torch.inference_mode():
            return self._model(**tensors).last_hidden_state


def compare(
    case: Case,
    engines: Sequence[Any],
    reference: Any,
    vocabulary: int,
    device: str,
    rounds: int,
    calls: int,
) -> list[dict[str, Any]]:
    """A row per engine; the first is ours, the reference is in float32."""
    arrays = inputs(case, vocabulary)
    real = arrays.get("attention_mask", np.ones((case.batch, case.length))) != 0
    want = reference.output(arrays)[real]
    outputs = {engine.name: engine.output(arrays)[real] for engine in engines}
    times: dict[str, list[float]] = {engine.name: [] for engine in engines}
    waited: dict[str, list[float]] = {engine.name: [] for engine in engines}
    for turn in range(rounds):
        for place in range(len(engines)):  # nobody always works behind the same engine
            engine = engines[(turn + place) % len(engines)]
            times[engine.name] += engine.milliseconds(arrays, calls)
            waited[engine.name] += engine.waited(arrays, device, calls)
    medians = {name: statistics.median(milliseconds) for name, milliseconds in times.items()}
    best = min((medians[engine.name] for engine in engines[1:]), default=None)
    return [
        {
            "case": case.name,
            "engine": name,
            "median_ms": median,
            "p90_ms": float(np.quantile(times[name], 0.9)),
            "call_ms": statistics.median(waited[name]) if waited[name] else None,
            "of_best_peer": median / best if best and name == engines[0].name else None,
            "limit": case.limit if name == engines[0].name else None,
            "cosine": _cosine(outputs[name], want),
            "max_abs_difference": float(np.abs(outputs[name] - want).max()),
            "lengths": real.sum(1).tolist(),
        }
        for name, median in medians.items()
    ]


def peaks(device: str, side: int = 8192, size: int = 4 << 30) -> dict[str, float]:
    """TFLOP/s of a product of random half-precision matrices, TB/s of a copy on the device, reads
    and writes counted.
    """
    a, b = (torch.randn(side, side, device=device).to(torch.float16) for _ in range(2))
    product = statistics.median(_timed(device, lambda: a @ b, CALLS))
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy = statistics.median(_timed(device, lambda: target.copy_(source), CALLS))
    return {"tflops": 2 * side**3 / product / 1e9, "copy_tbs": 2 * size / copy / 1e9}


def first_result(directory: Path) -> list[float]:
    """Seconds from the start of a process to its first result, of each of some processes."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import loader; import numpy as np;"
        "m = loader.load(sys.argv[1]); r = m(input_ids=np.ones((1, 128), np.int64));"
        "assert np.isfinite(next(iter(r.values()))).all()"
    )
    seconds = []
    for _ in range(STARTS):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", code, str(directory)], check=True)
        seconds.append(time.perf_counter() - began)
    return seconds


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for."""
    device, model = options.device, Path(options.model)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    half = "float16" if device == "cuda" else "float32"
    bundles = {"fp16": options.fp16, "int8": options.int8}
    cases = [case for case in CASES if bundles[case.precision]]
    cases = [case for case in cases if not options.cases or case.name in options.cases]
    ours = {
        kind: Bundle(f"Bertile {kind}", Path(bundles[kind]))
        for kind in dict.fromkeys(case.precision for case in cases)
    }
    reference = Peer("float32", model, device, "float32", False)
    peers = [Peer("PyTorch eager, SDPA", model, device, half, False)]
    if not options.no_compile:
        peers.append(Peer("PyTorch max-autotune", model, device, half, True))
    rows = []
    for case in cases:
        engines = [ours[case.precision], *peers]
        settings = (config["vocab_size"], device, options.rounds, options.calls)
        compared = compare(case, engines, reference, *settings)
        rows += compared
        for row in compared:
            said = f"{row['median_ms']:.3f} ms, a call {row['call_ms'] or 0:.3f} ms"
            print(f"{case.name}: {row['engine']} {said}, cosine {row['cosine']:.5f}", flush=True)
    return {
        "machine": _machine(device),
        "config": config,
        "peaks": peaks(device) if device == "cuda" else {},
        "first_result_s": first_result(Path(options.fp16)) if device == "cuda" else [],
        "rows": rows,
    }


def _machine(device: str) -> dict[str, str]:
    gpu = device == "cuda" and {"GPU": torch.cuda.get_device_name(), "CUDA": torch.version.cuda}
    return {**(gpu or {}), "torch": torch.__version__, "transformers": transformers.__version__}


def _timed(device: str, call: Callable[[], Any], calls: int) -> list[float]:
    """Milliseconds of each call, without waiting between them; on a CPU by its clock."""
    for _ in range(WARM if device == "cuda" else 1):
        call()
    if device != "cuda":
        stamps = [time.perf_counter()]
        for _ in range(calls):
            call()
            stamps.append(time.perf_counter())
        return [1e3 * (after - before) for before, after in itertools.pairwise(stamps)]
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for before, after in events:
        before.record()
        call()
        after.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in events]


def _waited(device: str, call: Callable[[], Any], calls: int) -> list[float]:
    """Milliseconds of calls, each waited for before the next."""

    def wait() -> None:
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    return _timed("cpu", wait, calls)


def _tensors(arrays: dict[str, np.ndarray], device: str) -> dict[str, Any]:
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    """The mean over tokens."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).mean())


def _loader(directory: Path) -> Any:
    """The loader of a bundle, or the installed one."""
    if not (directory / "loader.py").exists():
        return import_module("bertile.loader")
    sys.path.insert(0, str(directory))
    return import_module("loader")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write the result, print a line for each row of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fp16", metavar="BUNDLE", required=True)
    parser.add_argument("--int8", metavar="BUNDLE")
    parser.add_argument("--model", metavar="DIR", required=True, help="what they were made of")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES])
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--calls", type=int, default=CALLS)
    parser.add_argument("-o", "--output", metavar="RESULT", required=True)
    options = parser.parse_args(arguments)
    Path(options.output).write_text(json.dumps(measure(options), indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
