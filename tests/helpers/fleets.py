"""Starts trackers and device servers in processes of their own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

from bertile.base.errors import BertileError
from bertile.tune.measure import device


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def command(*words: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "bertile", "-q", "device", *words],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, **environment},
    )


def wait_for(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def devices(tracker: str, key: str = "board") -> int:
    try:
        return sum(server["free"] for server in device.fleet(tracker) if server["key"] == key)
    except BertileError:
        return -1


@contextlib.contextmanager
def two_servers(**environment: str):
    """A tracker and two servers, each the process group of a command of its own."""
    port = free_port()
    tracker = f"127.0.0.1:{port}"
    started = [command("tracker", "--host", "127.0.0.1", "--port", str(port))]
    try:
        wait_for(lambda: devices(tracker) == 0)
        for _ in range(2):
            serve = ("serve", "--tracker", tracker, "--key", "board", "--threads", "1")
            started.append(command(*serve, "--port", str(free_port()), **environment))
        wait_for(lambda: devices(tracker) == 2)
        yield tracker, started[1:]
    finally:
        for process in started:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
