"""Tuning on GPUs of other machines: a tracker and two servers on loopback, both with the pretended
device; one dies in the middle.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import pretended_gpu as pretended
from helpers.fleets import two_servers

from bertile.base.progress import Progress
from bertile.config import Config
from bertile.schedules import schedules_for
from bertile.schedules.task import Task
from bertile.targets.rows import resolve
from bertile.tune.log.tuning_log import TuningLog
from bertile.tune.measure import runners
from bertile.tune.measure.cuda import runner
from bertile.tune.search import tuner

# 4096 tokens take long without a GPU
ROW, QUIET = replace(resolve("cuda-sm90"), mix=((16, 1.0), (128, 1.0))), Progress(verbosity=-1)
NORM = Task("layer_norm", {"channels": 64, "epsilon": 1e-12, "precision": "fp16"})
KNOBS = schedules_for(ROW)["layer_norm"].default(NORM, ROW)

pytestmark = pytest.mark.slow  # servers, trackers and their processes


@pytest.fixture(scope="module")
def fleet():
    with two_servers(LD_LIBRARY_PATH=str(pretended.driver().parent)) as tracker_and_servers:
        yield tracker_and_servers


@pytest.fixture(scope="module")
def trials(fleet):
    with opened(fleet) as remote_runner:
        yield remote_runner


def opened(fleet, row=ROW):
    config = Config(tune="quick", rpc_tracker=fleet[0], rpc_key="board")
    return runner.open_runner(row, config)


def servers(fleet) -> list[str]:
    """The processes that listen, which their commands start again when they end."""
    return [
        Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text() for process in fleet[1]
    ]


def test_kernel_that_fails_costs_its_trial_and_no_server(fleet, trials, monkeypatch):
    before = servers(fleet)
    good, broken = (pretended.image(NORM, KNOBS, ROW, broken=bad) for bad in (False, True))
    monkeypatch.setattr(runner, "build", lambda *arguments: broken)
    for answer in runners.answers(trials, [(NORM, KNOBS)] * 2, 1, ()):
        assert "a kernel failed on emulated sm_90" in answer["error"]
    monkeypatch.setattr(runner, "build", lambda *arguments: good)
    for answer in runners.answers(trials, [(NORM, KNOBS)] * 2, 1, (3,)):
        assert min(answer["microseconds"]) > 0 and list(answer["also"]) == ["48"]
        assert answer["machine"]["gpu"] == "emulated sm_90"
    assert servers(fleet) == before and all(before)


def test_gpu_of_another_kind_is_refused_by_name(fleet, monkeypatch):
    monkeypatch.setattr(runner, "build", lambda *arguments: b"code that nothing loads")
    with opened(fleet, resolve("cuda-sm80")) as others:
        error = others.run(NORM, KNOBS, 1)["error"]
    assert "sm_90, the kernels are for cuda-sm80; give --target cuda-sm90" in error


def test_device_that_dies_costs_its_trial_alone(fleet, trials, tmp_path, monkeypatch):
    """Four trials on two devices; one is gone as soon as the first answer is there."""
    monkeypatch.setattr(runner, "build", pretended.image)
    candidates = [(NORM, {**KNOBS, "few": few}) for few in (512, 1024, 2048, 0)]
    log, answered = TuningLog([tmp_path], lambda text: None), []

    def kill_one(self, task, steps):
        answered.append(task)
        if len(answered) == 1:
            os.killpg(fleet[1][0].pid, signal.SIGKILL)

    monkeypatch.setattr(tuner._Session, "_show", kill_one)
    session = tuner._Session(log, ROW, trials, QUIET, time.monotonic() + 60, None)
    times = session.measure(candidates)
    assert len(answered) == 4 and sum(map(bool, times)) >= 3
    good = [record for record in log.records(NORM, ROW) if not record.error]
    assert len(good) == sum(map(bool, times)) and not any(record.estimated for record in good)
    assert all(record.machine["row"] == ROW.name and list(record.also) == ["16"] for record in good)
