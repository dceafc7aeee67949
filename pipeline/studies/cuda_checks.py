"""Checks a bundle on a GPU: its numbers, its memory, calls at once, tensors in place.

    python3 cuda_checks.py DIR

checks every bundle in DIR (``cuda_package --checks`` writes one, ONNX Runtime's answers beside each
bundle) with numpy, and torch where it is. The tests call the same functions.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ANSWERS = "answers.npz"
CALLS = 10_000
SHAPES = ((1, 1), (1, 16), (2, 17), (5, 40), (3, 128), (33, 7))  # batch, length

Arrays = dict[str, np.ndarray]


def numbers(model: Any, answers: Path) -> str:
    """Raises AssertionError where a result is farther from ONNX Runtime's than its tolerance."""
    worst = 0.0
    with np.load(answers) as file:
        relative = float(file["tolerance"])
        for number in range(int(file["requests"])):
            names = [name for name in file.files if name.startswith(f"{number}.")]
            arrays = {name.split(".", 2)[2]: file[name] for name in names if ".in." in name}
            outputs = model(**arrays)
            for name in (entry for entry in names if ".out." in entry):
                want, got = file[name], outputs[name.split(".", 2)[2]]
                assert got.shape == want.shape, f"{name}: {got.shape}, not {want.shape}"
                real = arrays["attention_mask"] != 0
                if want.shape[:2] == real.shape:
                    got, want = got[real], want[real]
                share = float(np.abs(got - want).max()) / (relative * max(1.0, np.abs(want).max()))
                assert share <= 1, f"{name}: {share:.1f} times what may be off"
                worst = max(worst, share)
    return f"at most {worst:.2f} of the tolerance {relative:g}"


def memory(model: Any, calls: int = CALLS) -> str:
    """Calls of changing shapes hold the memory of the device that a tenth of them took."""
    requests = [_request(model, batch, length) for batch, length in SHAPES]
    wanted = [_first(model(**request)) for request in requests]
    taken = 0
    for number in range(calls):
        place = number % len(requests)
        got = _first(model(**requests[place]))
        assert np.array_equal(got, wanted[place]), f"call {number} gives another result"
        if number == calls // 10:
            taken = free(model)
    lost = taken - free(model)
    assert lost <= 0, f"{lost} bytes are lost in {calls} calls"
    return f"{calls} calls"


def streams(model: Any, threads: int = 4, calls: int = 50) -> str:
    """Threads that call at once get what each gets alone."""
    requests = [_request(model, *SHAPES[number % len(SHAPES)]) for number in range(threads)]
    wanted = [_first(model(**request)) for request in requests]
    wrong: list[str] = []

    def call_often(number: int) -> None:
        try:
            for _ in range(calls):
                if not np.array_equal(_first(model(**requests[number])), wanted[number]):
                    wrong.append(f"thread {number} got another result")
        except Exception as error:
            wrong.append(f"thread {number}: {error}")

    workers = [threading.Thread(target=call_often, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong, wrong[0]
    return f"{threads} threads"


def tensors(model: Any) -> str:
    """torch's tensors on the device are read in place, on its stream, and its own come back."""
    import torch

    request = _request(model, 3, 32)
    want = _first(model(**request))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        placed = {name: torch.from_numpy(array).cuda() for name, array in request.items()}
        output = torch.from_dlpack(_first(model(stream=stream, **placed)))
        doubled = (output.double() * 2).cpu().numpy()
    assert output.is_cuda and np.abs(doubled - 2 * want).max() <= 1e-3 * np.abs(want).max()
    return f"torch {torch.__version__}"


def free(model: Any) -> int:
    """Bytes of the device that nobody has."""
    left, total = ctypes.c_size_t(), ctypes.c_size_t()
    with model.gpu:
        model.gpu.call("cuMemGetInfo_v2", ctypes.byref(left), ctypes.byref(total))
    return left.value


def _request(model: Any, batch: int, length: int) -> Arrays:
    below = min(entry["below"] or 1000 for entry in model.manifest["inputs"][:1])
    draw = np.random.default_rng(batch * length)
    return {model.inputs[0]: draw.integers(2, below, (batch, length))}


def _first(outputs: dict[str, Any]) -> Any:
    return next(iter(outputs.values()))


def check(directory: Path) -> list[str]:
    """A line for each check of a bundle; those of calls on one bundle of all."""
    sys.path.insert(0, str(directory))
    import loader

    lines = []
    with loader.load(directory) as model:
        todo: list[tuple[str, Any]] = [("numbers", lambda: numbers(model, directory / ANSWERS))]
        if directory.name.endswith("-fp16"):
            todo += [("memory", lambda: memory(model)), ("streams", lambda: streams(model))]
            todo.append(("tensors", lambda: tensors(model)))
        for name, attempt in todo:
            try:
                lines.append(f"ok      {directory.name}  {name}: {attempt()}")
            except Exception as error:
                lines.append(f"FAILED  {directory.name}  {name}: {error}")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the bundles of a directory; the exit code is 1 where a check fails."""
    (place,) = arguments if arguments is not None else sys.argv[1:]
    verdicts = []
    for directory in sorted(path.parent for path in Path(place).glob(f"*/{ANSWERS}")):
        verdicts += check(directory)
        print("\n".join(verdicts[-4:]), flush=True)
    failed = sum(line.startswith("FAILED") for line in verdicts)
    print(f"{len(verdicts)} checks, {failed} failed")
    return int(failed > 0 or not verdicts)


if __name__ == "__main__":
    sys.exit(main())
