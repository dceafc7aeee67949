"""Tuning on devices: TVM's tracker and servers on loopback, one of which dies in the middle."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import time
from collections import Counter
from pathlib import Path

import pytest
from helpers.fleets import free_port, two_servers

from bertile.base.errors import BertileError, UsageError
from bertile.base.progress import Progress
from bertile.cli import device as device_command
from bertile.cli import main
from bertile.config import Config
from bertile.schedules.cpu import SCHEDULES
from bertile.schedules.task import Task
from bertile.targets.rows import native, resolve
from bertile.tune.log.tuning_log import TuningLog
from bertile.tune.measure import device, runners
from bertile.tune.search import tuner

NORM = Task("layer_norm", {"channels": 32, "epsilon": 1e-12})
DENSE = Task("dense", {"inputs": 32, "outputs": 24, "activation": "gelu", "residual": False})
ROW, QUIET = resolve(native().name, 1), Progress(verbosity=-1)


@pytest.fixture(scope="module")
def fleet():
    with two_servers() as tracker_and_servers:
        yield tracker_and_servers


def tune(tracker: str, directory: Path, tasks: list[Task]) -> tuple[dict, TuningLog]:
    log = TuningLog([directory], lambda text: None)
    config = Config(tune="quick", rpc_tracker=tracker, rpc_key="board")
    return tuner.tune(Counter(), log, ROW, config, QUIET, dict.fromkeys(tasks)), log


def test_fleet_is_listed(fleet, capsys):
    assert main.main(["device", "list", "--tracker", fleet[0]]) == 0
    key, count, *_ = capsys.readouterr().out.splitlines()[-1].split()
    assert (key, count) == ("board", "2")


def test_device_that_dies_costs_its_trial_alone(fleet, tmp_path, monkeypatch):
    """Four trials on two devices; one is gone as soon as the first answer is there."""
    tracker, (victim, _) = fleet
    space = SCHEDULES["dense"].space(DENSE, ROW)
    default = SCHEDULES["dense"].default(DENSE, ROW)
    candidates = [(DENSE, {**default, "chunk": chunk}) for chunk in space["chunk"]]
    log = TuningLog([tmp_path], lambda text: None)
    config = Config(tune="quick", rpc_tracker=tracker, rpc_key="board")
    answered = []

    def kill_one(self, task, **_):
        answered.append(task)
        if len(answered) == 1:
            os.killpg(victim.pid, signal.SIGKILL)

    monkeypatch.setattr(tuner._Session, "_show", kill_one)
    with runners.open_runner(ROW, config) as trials:
        assert trials.parallel == 2
        session = tuner._Session(log, ROW, trials, QUIET, time.monotonic() + 60, None)
        times = session.measure(candidates)
    assert len(answered) == 4 and sum(map(bool, times)) >= 3
    good = [record for record in log.records(DENSE, ROW) if not record.error]
    assert len(good) == sum(map(bool, times)) and not any(record.estimated for record in good)
    assert all(
        len(record.microseconds) == 5 and sorted(record.also) == ["16", "384"] for record in good
    )
    assert all(record.machine["row"] == ROW.name and record.machine["cpu"] for record in good)


def test_absent_tracker_and_device_are_said_with_what_to_do(tmp_path):
    nowhere = f"127.0.0.1:{free_port()}"
    with pytest.raises(BertileError, match=r"no tracker answers.*bertile device tracker"):
        tune(nowhere, tmp_path, [NORM])
    with pytest.raises(UsageError, match="HOST:PORT"):
        device.address("localhost")
    with pytest.raises(UsageError, match="need each other; give both"):
        Config(rpc_tracker=nowhere)
    assert main.main(["device", "serve", "--key", "board"]) == 2


def test_other_kind_of_device_is_refused_by_name(fleet, tmp_path):
    log = TuningLog([tmp_path], lambda text: None)
    config = Config(tune="quick", rpc_tracker=fleet[0], rpc_key="phone")
    with pytest.raises(BertileError, match="no device 'phone': it has board"):
        tuner.tune(Counter(), log, ROW, config, QUIET, [NORM])


def test_servers_and_trackers_listen_on_this_machine_alone():
    parser = argparse.ArgumentParser()
    device_command.add_arguments(parser)
    assert parser.parse_args(["serve"]).host == "127.0.0.1"


@pytest.mark.parametrize("host, warned", [("0.0.0.0", True), ("127.0.0.1", False)])
def test_a_host_that_others_reach_is_warned_of(capsys, host, warned):
    device._warn(host, 9090, Progress(verbosity=0))
    assert ("runs code as you" in capsys.readouterr().err) == warned


def test_a_host_that_is_none_is_refused():
    with pytest.raises(UsageError, match="is not a network interface of this machine"):
        device._warn("no.such.host.invalid", 9090, QUIET)


def test_connections_that_say_nothing_do_not_keep_the_first_that_speaks(monkeypatch):
    with device._Patient() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(8)
        silent = [socket.create_connection(server.getsockname()) for _ in range(3)]
        speaker = socket.create_connection(server.getsockname())
        speaker.sendall(b"hello")
        connection, peer = server.accept()
        assert connection.recv(5) == b"hello" and peer == speaker.getsockname()
        assert all(each.recv(1) == b"" for each in silent)  # given up
        monkeypatch.setattr(device, "SPEAK_SECONDS", 0.05)
        silent.append(socket.create_connection(server.getsockname()))
        with pytest.raises(TimeoutError):
            server.accept()
        for each in (connection, speaker, *silent):
            each.close()
