"""A bundle as it is handed to someone else: typed alone, called at once, called for long."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import bertile
from bertile.cli import main
from bertile.config import Config
from bertile.export import cached
from bertile.onnx.exported import ExportedModel
from bertile.onnx.samples import largest_difference, sample, session

MODEL = "synthetic:bert-tiny"
TOLERANCE = 2e-5  # float32 sums in another order, relative to the largest value of the output


@pytest.fixture(scope="module")
def directory(tmp_path_factory, stages) -> Path:
    """The bundle that the README's command writes: its runtime is in it."""
    output = tmp_path_factory.mktemp("bundles") / "out"
    command = ["compile", MODEL, "-o", str(output), "--cache-dir", stages]
    assert main.main(["-q", *command]) == 0
    return output


@pytest.fixture(scope="module")
def exported(directory, stages) -> ExportedModel:
    return cached.export_cached(MODEL, Config(cache_dir=stages))


@pytest.fixture(scope="module")
def model(directory):
    with bertile.load(directory) as loaded:
        yield loaded


def run_bare(python: Path, directory: Path, *arguments: str) -> str:
    run = subprocess.run(
        [python, "loader.py", *arguments],
        cwd=directory,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (run.returncode, run.stderr) == (0, "")
    return run.stdout


def cases(exported: ExportedModel, shapes) -> list[tuple[dict, list[np.ndarray]]]:
    """Inputs of those shapes and what ONNX Runtime makes of them."""
    peer = session(exported.onnx_path)
    arrays = [sample(exported.inputs, *shape, 0, seed) for seed, shape in enumerate(shapes)]
    return [(feed, peer.run(list(exported.outputs), feed)) for feed in arrays]


def assert_right(outputs: dict, want: list[np.ndarray], mask: np.ndarray) -> None:
    assert len(outputs) == len(want)
    for got, reference in zip(outputs.values(), want):
        tolerance = TOLERANCE * max(1, np.abs(reference).max())
        assert largest_difference(got, reference, mask) <= tolerance


def test_loader_typed_in_the_bundle_runs_it_with_numpy_alone(bare, directory):
    text = run_bare(bare, directory)
    assert "model    synthetic:bert-tiny (bert, encoder, at most 512 tokens)" in text
    assert "output   last_hidden_state (2, 8, 128): " in text
    assert "output   pooler_output (2, 128): " in text


def test_loader_typed_with_ids_prints_the_numbers_of_onnxruntime(bare, directory, exported):
    ids = [2, 101, 999, 7, 3]
    text = run_bare(bare, directory, "--ids", ",".join(map(str, ids)), "--threads", "1")
    arrays = {"input_ids": [ids], "attention_mask": [[1] * 5], "token_type_ids": [[0] * 5]}
    feed = {name: np.array(value) for name, value in arrays.items()}
    want = session(exported.onnx_path).run(list(exported.outputs), feed)
    lines = [line for line in text.splitlines() if line.startswith("output ")]
    assert len(lines) == len(want) == 2
    for line, name, reference in zip(lines, exported.outputs, want):
        head, _, numbers = line.partition(": ")
        assert head == f"output   {name} {reference.shape}"
        shown = [float(number) for number in numbers.split(", ") if number != "…"]
        np.testing.assert_allclose(shown, reference.ravel()[:4], atol=1e-4)


def test_one_model_called_from_four_threads_is_right_in_each(model, exported):
    shapes = [(1 + number % 3, 1 + 23 * number) for number in range(8)]
    pairs = cases(exported, shapes)

    def call(thread: int) -> int:
        for step in range(24):
            arrays, want = pairs[(thread + step) % len(pairs)]
            assert_right(model(**arrays), want, arrays["attention_mask"])
        return thread

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(call, range(4))) == [0, 1, 2, 3]


def resident() -> float:
    """The resident memory of this process in MiB."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_300_calls_of_changing_shapes_keep_their_memory(model, exported):
    random = np.random.default_rng(0)
    shapes = [(int(random.integers(1, 5)), int(random.integers(1, 200))) for _ in range(300)]
    for _ in range(20):  # as large as any of them: what a pool keeps, it has now
        model(input_ids=np.ones((4, 199), np.int64))
    for shape in shapes[:60]:
        model(input_ids=np.ones(shape, np.int64))
    before = resident()
    for shape in shapes:
        model(input_ids=np.ones(shape, np.int64))
    # one call's activations are some 10 MiB, kept for each shape they would be a thousand
    assert resident() - before < 32


PROCESS = """
import sys
import numpy as np
import bertile
model, data = bertile.load(sys.argv[1]), np.load(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
names = [name for name in data.files if name in model.inputs]
for _ in range(40):
    outputs = model(**{name: data[name] for name in names})
np.savez(sys.argv[3], **outputs)
"""


def test_two_processes_on_one_bundle_are_both_right(directory, exported, tmp_path):
    pairs = cases(exported, [(3, 100), (2, 61)])
    running = []
    for number, (arrays, _) in enumerate(pairs):
        np.savez(tmp_path / f"in{number}.npz", **arrays)
        files = [str(tmp_path / f"{kind}{number}.npz") for kind in ("in", "out")]
        command = [sys.executable, "-c", PROCESS, str(directory), *files]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        running.append(subprocess.Popen(command, text=True, **pipes))
    for process in running:
        assert process.stdout.readline() == "ready\n"
    for process in running:  # both have the bundle now; go
        process.stdin.write("go\n")
        process.stdin.flush()
    for number, (process, (arrays, want)) in enumerate(zip(running, pairs)):
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        with np.load(tmp_path / f"out{number}.npz") as file:
            outputs = {name: file[name] for name in exported.outputs}
        assert_right(outputs, want, arrays["attention_mask"])
