"""Candidates on a GPU: what a trial finds, the search, and rounds over a machine without a network;
all on the pretended device.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import pretended_gpu as pretended

from bertile.base.errors import PlatformError, UsageError
from bertile.base.progress import Progress
from bertile.cli import main
from bertile.config import Config
from bertile.schedules import schedules_for
from bertile.schedules.task import Task
from bertile.targets.rows import resolve
from bertile.tune.archive import cuda_packer, ingester, packer
from bertile.tune.log.tuning_log import TuningLog
from bertile.tune.measure.cuda import runner, trial
from bertile.tune.measure.cuda.card import Card
from bertile.tune.search import tuner

# 4096 tokens take long without a GPU
ROW, QUIET = replace(resolve("cuda-sm90"), mix=((16, 1.0), (128, 1.0))), Progress(verbosity=-1)
SHAPE = {"inputs": 64, "outputs": 48, "activation": "gelu", "residual": False}
DENSE = Task("dense", {**SHAPE, "precision": "fp16"})
NORM = Task("layer_norm", {"channels": 64, "epsilon": 1e-12, "precision": "fp16"})
TASKS = Counter({DENSE: 2})


@pytest.fixture
def device(monkeypatch):
    """The pretended device, here and in processes that are started."""
    driver = pretended.driver()
    monkeypatch.setenv("LD_LIBRARY_PATH", str(driver.parent))
    monkeypatch.setattr(trial, "open_card", pretended.open_card)
    monkeypatch.setattr(runner, "Card", pretended.open_card)
    monkeypatch.setattr(runner, "build", pretended.image)
    monkeypatch.setattr(cuda_packer, "build", pretended.image)
    monkeypatch.setattr(cuda_packer.rates, "build", lambda row: b"")
    return pretended.open_card()


def open_log(directory: Path) -> TuningLog:
    return TuningLog([directory], lambda text: None)


def tried(task: Task, path: Path, made_of: Task | None = None, row=ROW) -> dict:
    knobs = schedules_for(row)[task.operation].default(task, row)
    path.write_bytes(pretended.image(made_of or task, knobs, row))
    arguments = (task.operation, dict(task.shape), knobs, row.name, 1)
    return trial.measure(*arguments, 1, (3,), image=str(path))


def test_trial_gives_times_for_each_number_of_tokens_and_gives_memory_back(device, tmp_path):
    free = free_memory(device)
    for task in (DENSE, NORM):
        outcome = tried(task, tmp_path / "image")
        assert len(outcome["microseconds"]) == trial.REPEATS and min(outcome["microseconds"]) > 0
        assert list(outcome["also"]) == ["48"]
        assert outcome["machine"]["gpu"] == "emulated sm_90"
    assert free_memory(device) == free


def free_memory(card: Card) -> int:
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    with card:
        card.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    return free.value


def test_wrong_result_is_an_error_not_a_time(device, tmp_path, monkeypatch):
    """The code of a kernel that lacks the activation, under the name of one that has it."""
    other = Task("dense", {**DENSE.shape, "activation": "relu"})
    monkeypatch.setattr(Task, "name", "dense_of_either_kind")
    assert "wrong result" in tried(DENSE, tmp_path / "image", other)["error"]


def test_result_that_nobody_writes_is_found(device, tmp_path, monkeypatch):
    """Buffers are poisoned: what a kernel leaves out is no zero by chance."""
    knobs = schedules_for(ROW)["layer_norm"].default(NORM, ROW)
    (tmp_path / "image").write_bytes(pretended.image(NORM, knobs, ROW))
    schedule = schedules_for(ROW)["layer_norm"]

    def half(task, knobs, row):
        kernel = schedule.kernel(task, knobs, row)
        launches = [replace(launch, grid=(1, 1, 1)) for launch in kernel.launches]
        return replace(kernel, launches=tuple(launches))

    monkeypatch.setitem(schedules_for(ROW), "layer_norm", replace(schedule, kernel=half))
    arguments = (NORM.operation, dict(NORM.shape), knobs, ROW.name, 1)
    assert "wrong result" in trial.measure(*arguments, 8, image=str(tmp_path / "image"))["error"]


def test_kernels_of_another_row_are_refused_by_name(device):
    with pytest.raises(PlatformError, match="sm_90, the kernels are for cuda-sm80; give --target"):
        trial.check(device, resolve("cuda-sm80"))


def test_weights_that_the_cache_would_hold_are_there_many_times(device):
    megabytes = [np.zeros(3 << 20, np.uint8)]
    assert trial._copies(megabytes, device) * (3 << 20) >= 2 * device.l2_bytes
    assert trial._copies([np.zeros(64, np.uint8)], device) == 1 == trial._copies([], device)


def test_search_tries_candidates_one_at_a_time_in_another_process(device, tmp_path):
    log = open_log(tmp_path)
    result = tuner.tune(
        *(TASKS, log, ROW, Config(tune="quick", trials=3), QUIET, {NORM: None}), runner.open_runner
    )
    records = log.records(DENSE, ROW)
    assert result["trials"] == len(records) + 1 and len(log.records(NORM, ROW)) == 1
    assert len(records) >= 3 and not any(record.error for record in records)
    assert len({json.dumps(dict(record.knobs)) for record in records}) == len(records)
    assert all(record.machine["gpu"] and record.threads == 1 for record in records)
    assert all(record.tokens == 128 and list(record.also) == ["16"] for record in records)


def test_candidate_that_is_not_compiled_costs_itself_alone(device, monkeypatch):
    def refused(task, knobs, row):
        raise UsageError("nvcc does not compile this")

    with runner.open_runner(ROW, Config()) as trials:
        monkeypatch.setattr(runner, "build", refused)
        knobs = schedules_for(ROW)["layer_norm"].default(NORM, ROW)
        assert "does not compile" in trials.run(NORM, knobs, 1)["error"]


def test_kernel_that_fails_costs_itself_and_its_process_alone(device, monkeypatch):
    """A GPU's context is lost with it: the next candidate gets a new process."""
    knobs = schedules_for(ROW)["layer_norm"].default(NORM, ROW)
    with runner.open_runner(ROW, Config()) as trials:
        good = pretended.image(NORM, knobs, ROW)
        images = iter([pretended.image(NORM, knobs, ROW, broken=True), good])
        monkeypatch.setattr(runner, "build", lambda *arguments: next(images))
        assert "a kernel failed on emulated sm_90" in trials.run(NORM, knobs, 1)["error"]
        assert "microseconds" in trials.run(NORM, knobs, 1)


def test_machine_without_a_gpu_is_told_the_ways_out(tmp_path):
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this machine has a GPU")
    with pytest.raises(PlatformError, match=r"cannot be measured on this machine.*--pack FILE"):
        runner.open_runner(ROW, Config())
    with pytest.raises(UsageError, match="no model of cuda-sm90"):
        runner.open_runner(ROW, Config(runner="mca"))


@pytest.fixture
def archive(device, tmp_path) -> Path:
    path = tmp_path / "round1.pyz"
    arguments = (TASKS, [NORM], open_log(tmp_path / "log"), ROW, Config(trials=2), path, QUIET)
    counts = packer.pack(*arguments, cuda_packer.CudaPack)
    assert (counts["tasks"], counts["candidates"]) == (2, 3) and counts["size_bytes"] < 1 << 20
    return path


def run(archive: Path, *words: str, driver: str | None = None) -> subprocess.CompletedProcess:
    """The archive by a Python that has numpy and nothing of ours, and that cannot import TVM."""
    blocked = archive.parent / "blocked"
    blocked.mkdir(exist_ok=True)
    for name in ("tvm", "torch", "onnx"):
        (blocked / f"{name}.py").write_text("raise ImportError('this machine does not have it')\n")
    code = "import runpy, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv.pop(0));"
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    line = [sys.executable, "-c", code, str(blocked), str(archive), *words]
    env = {**os.environ, "LD_LIBRARY_PATH": driver or str(pretended.driver().parent)}
    return subprocess.run(line, capture_output=True, text=True, env=env, cwd="/", check=False)


def test_times_come_home_once_and_the_next_round_goes_on(archive, tmp_path, capsys):
    done = run(archive, "--output", str(tmp_path / "result"))
    assert done.returncode == 0, done.stderr
    assert "3 candidates measured, 0 of them failed" in done.stderr
    log = open_log(tmp_path / "log")
    counts = ingester.ingest(tmp_path / "result", log, QUIET)
    assert (counts["added"], counts["failed"]) == (3, 0) and counts["device"] == "emulated sm_90"
    again = ["tune", "--ingest", str(tmp_path / "result"), "--log-dir", str(tmp_path / "log")]
    assert main.main([*again, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["known"] == 3
    records = log.records(DENSE, ROW)
    assert dict(records[0].knobs) == schedules_for(ROW)["dense"].default(DENSE, ROW)
    for record in (*records, *log.records(NORM, ROW)):
        assert len(record.microseconds) == trial.REPEATS and list(record.also) == ["16"]
        assert record.machine["row"] == ROW.name and record.machine["l2_bytes"]
    second = tmp_path / "round2.pyz"
    counts = packer.pack(
        TASKS, [NORM], log, ROW, Config(trials=2), second, QUIET, cuda_packer.CudaPack
    )
    assert (counts["tasks"], counts["candidates"]) == (1, 2)
    with zipfile.ZipFile(second) as file:
        manifest = json.loads(file.read("manifest.json"))
    known = [dict(record.knobs) for record in records]
    assert all(candidate["knobs"] not in known for candidate in manifest["candidates"])


def test_archive_begins_with_the_first_candidate_of_each_task(archive):
    with zipfile.ZipFile(archive) as file:
        candidates = json.loads(file.read("manifest.json"))["candidates"]
    assert [candidate["task"] for candidate in candidates] == [0, 1, 0]


def test_archive_ends_in_time_and_with_what_it_has(archive, tmp_path):
    done = run(archive, "--output", str(tmp_path / "result"), "--seconds", "1e-9")
    assert done.returncode == 0 and "0 candidates measured" in done.stderr
    log = open_log(tmp_path / "log")
    assert ingester.ingest(tmp_path / "result", log, QUIET)["added"] == 0


def test_archive_on_a_machine_without_a_gpu_says_so(archive, tmp_path):
    done = run(archive, "--output", str(tmp_path / "result"), driver="/nowhere")
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this machine has a GPU")
    assert done.returncode == 3 and "driver's library cannot be loaded" in done.stderr
