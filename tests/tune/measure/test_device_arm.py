"""Tuning on a device of another architecture: TVM's RPC server in an arm64 Debian, under QEMU."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from helpers.fleets import command, devices, free_port, wait_for

import bertile
from bertile.base.progress import Progress
from bertile.config import Config
from bertile.run import qemu as emulator
from bertile.schedules.cpu import SCHEDULES
from bertile.schedules.task import Task
from bertile.targets.rows import resolve
from bertile.tune.log.tuning_log import TuningLog
from bertile.tune.search import tuner

pytestmark = pytest.mark.slow

ROOT = Path(sys.prefix, "arm/python")  # which install_arm_python.sh makes
ROW = resolve("arm-a76", 1)
PYTHON = ROOT / "usr/bin/python3.11"
SECONDS = 300.0  # in which an emulated Python has imported TVM
# What Linux says of the processor that QEMU is told to be: QEMU 7 shows this machine's own.
CPUINFO = "processor\t: 0\nFeatures\t: fp asimd asimdhp asimddp\nCPU part\t: 0xd0b\n"
SERVE = "import sys; sys.executable = sys.argv.pop(1); from bertile.cli.main import main; main()"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A tracker of this machine's, and the server that an ARM board would run."""
    if not PYTHON.exists():
        pytest.skip(f"there is no {PYTHON}; as root: make test-arm")
    if shutil.which("qemu-aarch64") is None:
        pytest.skip("qemu-aarch64 is not installed; make test-arm")
    directory = tmp_path_factory.mktemp("server")
    package = installed(directory / "packages")
    (ROOT / "proc").mkdir(exist_ok=True)
    (ROOT / "proc/cpuinfo").write_text(CPUINFO, encoding="ascii")
    # a process that the server starts anew is a program of this machine's: QEMU with Python
    qemu = [shutil.which("qemu-aarch64"), "-L", ROOT, "-cpu", emulator.processor(ROW), PYTHON]
    python = directory / "python"
    python.write_text(f'#!/bin/sh\nexec {" ".join(map(str, qemu))} "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    port = free_port()
    tracker = f"127.0.0.1:{port}"
    started = [command("tracker", "--host", "127.0.0.1", "--port", str(port))]
    try:
        wait_for(lambda: devices(tracker) == 0)
        line = [python, "-c", SERVE, python, "device", "serve", "--tracker", tracker]
        line += ["--key", "board", "--threads", "1", "--port", str(free_port())]
        env = {**os.environ, "PYTHONPATH": str(package)}
        log = directory.joinpath("log").open("w")
        started.append(
            subprocess.Popen(line, env=env, stdout=log, stderr=log, start_new_session=True)
        )
        wait_for(lambda: devices(tracker) == 1, SECONDS)
        yield tracker
    finally:
        for process in started:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def installed(directory: Path) -> Path:
    """Bertile as a wheel would lay it down: a checkout's packages lie side by side."""
    shutil.copytree(bertile.__path__[0], directory / "bertile")
    schedules = Path(sys.modules["bertile.schedules"].__path__[0])
    shutil.copytree(schedules, directory / "bertile/schedules")
    return directory


@pytest.mark.usefixtures("no_slow_spells")
def test_kernels_of_an_arm_row_are_measured_on_an_arm_server(server, tmp_path):
    """Built here, run and compared with the reference there; the record says where."""
    shape = {"inputs": 32, "outputs": 24, "activation": "gelu", "residual": False}
    tasks = [Task("dense", shape), Task("dense", {**shape, "precision": "int8"})]
    log = TuningLog([tmp_path], lambda text: None)
    config = Config(tune="quick", rpc_tracker=server, rpc_key="board")
    quiet = Progress(verbosity=-1)
    trials = tuner.tune(Counter(), log, ROW, config, quiet, dict.fromkeys(tasks))["trials"]
    assert trials == 2
    for task in tasks:
        record = log.best(task, ROW)
        assert len(log.records(task, ROW)) == 1
        assert record.error is None and not record.estimated
        assert len(record.microseconds) == 5 and min(record.microseconds) > 0
        assert record.machine["row"] == "arm-a76" and set(record.also) == {"16", "384"}
        assert dict(record.knobs) == SCHEDULES["dense"].default(task, ROW)


def test_row_that_the_board_cannot_run_is_refused_by_the_feature(server, tmp_path):
    """The server says what it is: a Cortex-A76 has no i8mm."""
    task = Task("layer_norm", {"channels": 32, "epsilon": 1e-12})
    log, row = TuningLog([tmp_path], lambda text: None), resolve("arm-v1", 1)
    config = Config(tune="quick", rpc_tracker=server, rpc_key="board")
    tuner.tune(Counter(), log, row, config, Progress(verbosity=-1), [task])
    (record,) = log.records(task, row)
    assert re.search(r"the device lacks .*i8mm.*, which arm-v1 needs", record.error)
