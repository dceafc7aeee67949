"""Runs a board's part of tuning: a server on it that runs candidates, the tracker that shares
servers out, and the list of them. All three are TVM's own RPC.
"""

from __future__ import annotations

import ipaddress
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bertile.base.errors import BertileError, UsageError, require
from bertile.base.machine import cpu_name
from bertile.base.progress import Progress
from bertile.base.tables import table
from bertile.loader import available_cores, cpu_features, set_thread_defaults
from bertile.tune.measure.cuda import serving
from bertile.tune.measure.roofline import use_threads

TRACKER_PORT, SERVER_PORT, PORTS = 9190, 9090, 100
RESTART_SECONDS = 1.0
LOOPBACK = "127.0.0.1"
SPEAK_SECONDS = 5.0  # that a new connection has to say what it wants
SILENT = 64  # connections that have said nothing yet; of more, the oldest is closed
OPEN = (
    "{host} lets other machines in, and TVM's protocol runs what it is sent: whoever reaches port"
    " {port} runs code as you. Use it in a network that you trust alone."
)
COLD_BYTES = 64 << 20  # written before each timed run, so that weights come from memory


def address(text: str) -> tuple[str, int]:
    """HOST:PORT as its parts; UsageError for anything else."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(f"'{text}' is not the address of a tracker", "give HOST:PORT")
    return host.strip("[]"), int(port)


def serve(
    tracker: str, key: str, host: str, port: int, threads: int | None, progress: Progress
) -> None:
    """Run a server until Ctrl-C; one that a candidate takes down with it is started again.

    ``host`` is the interface that it listens on.
    """
    address(tracker)
    _warn(host, port, progress)
    cores = str(threads or available_cores())
    command = [sys.executable, "-m", "bertile.tune.measure.device", tracker, key, host, str(port)]
    progress.say(f"serving '{key}' for the tracker at {tracker}, {cores} threads; Ctrl-C ends it")
    while True:
        server = subprocess.Popen(command, env={**os.environ, "TVM_NUM_THREADS": cores})
        try:
            code = server.wait()
        finally:
            server.kill()
            server.wait()
        progress.say(f"a candidate ended the server (code {code}); it is started again")
        time.sleep(RESTART_SECONDS)


def run_tracker(host: str, port: int, progress: Progress) -> None:
    """Run a tracker until Ctrl-C, which listens on the interface ``host``."""
    require("tracker", "tornado")
    _warn(host, port, progress)
    from tvm.rpc.tracker import Tracker

    tracker = Tracker(host=host, port=port, port_end=port + 1, silent=True)
    progress.say(f"tracker on {host}:{tracker.port}; Ctrl-C ends it")
    try:
        while True:
            time.sleep(3600)
    finally:
        tracker.terminate()


def _warn(host: str, port: int, progress: Progress) -> None:
    """Say what it means that other machines reach a port; UsageError for no host."""
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(host, port, socket.AF_INET)}
    except OSError as error:
        raise UsageError(
            f"'{host}' is not a network interface of this machine: {error.strerror}",
            f"give --host {LOOPBACK}, 0.0.0.0 for all interfaces, or the address of one",
        ) from error
    if not all(ipaddress.ip_address(known).is_loopback for known in addresses):
        progress.say(OPEN.format(host=host, port=port))


def fleet(tracker: str) -> list[dict[str, Any]]:
    """One row per kind of device: its key, how many servers, how many of them free, who waits."""
    summary = _summary(tracker)
    servers: Counter[str] = Counter()
    for server in summary["server_info"]:
        servers[server["key"].partition(":")[2]] += 1
    rows = []
    for key in sorted({*servers, *summary["queue_info"]}):
        queue = summary["queue_info"].get(key, {"free": 0, "pending": 0})
        if servers[key] or queue["pending"]:
            rows.append({"key": key, "devices": servers[key], **queue})
    return rows


def session(tracker: str, key: str, seconds: float, file: Path) -> Any:
    """A connection to the next free device of a key, which has the file under its name; the device
    ends it after so many seconds.
    """
    from tvm import rpc

    board = rpc.connect_tracker(*address(tracker)).request(key, session_timeout=seconds)
    board.upload(str(file))
    return board


def as_text(rows: list[dict[str, Any]]) -> str:
    """The fleet as a table."""
    if not rows:
        return "the tracker knows no device; start one with: bertile device serve"
    return table(list(rows[0]), [list(row.values()) for row in rows])


def _summary(tracker: str) -> dict[str, Any]:
    from tvm import rpc

    host, port = address(tracker)
    try:
        socket.create_connection((host, port), timeout=5).close()
        return rpc.connect_tracker(host, port).summary()
    except (OSError, RuntimeError) as error:
        raise BertileError(
            f"no tracker answers at {tracker}: {error}", "start one with: bertile device tracker"
        ) from error


def _register() -> None:
    """What a session may ask of the board beside running a kernel."""
    import numpy as np
    import tvm

    scratch = np.zeros(COLD_BYTES, "uint8")

    @tvm.register_global_func("bertile.cold", override=True)
    def cold(*_: Any) -> None:
        scratch[:] = 1 - scratch[0]

    @tvm.register_global_func("bertile.threads", override=True)
    def threads(count: int) -> None:
        use_threads(count)

    @tvm.register_global_func("bertile.facts", override=True)
    def facts() -> str:
        machine = {
            "cpu": cpu_name(),
            "cores": available_cores(),
            "features": sorted(cpu_features()),
        }
        return json.dumps({**machine, "threads": int(os.environ["TVM_NUM_THREADS"])})


class _Patient(socket.socket):
    """A socket whose ``accept`` gives the first connection that speaks, however many say nothing.

    TVM's server reads from each in turn what it wants, and would wait for a silent one for ever.
    """

    def accept(self) -> tuple[socket.socket, Any]:
        silent: dict[socket.socket, Any] = {}
        end = time.monotonic() + SPEAK_SECONDS
        try:
            while (left := end - time.monotonic()) > 0:
                for speaker in select.select([self, *silent], [], [], left)[0]:
                    if speaker is not self:
                        speaker.settimeout(SPEAK_SECONDS)  # for the rest of what it has to say
                        return speaker, silent.pop(speaker)
                    connection, peer = super().accept()
                    silent[connection] = peer
                    if len(silent) > SILENT:
                        oldest = next(iter(silent))
                        del silent[oldest]
                        oldest.close()
        finally:
            for connection in silent:
                connection.close()
        raise TimeoutError("nobody spoke")  # which the server takes as a reason to ask again


def _patient(server: Any) -> None:
    """Make TVM's server, in a process that does nothing else, wait for nobody who says nothing."""
    loop = server._serve_loop

    def serve_loop(connection: socket.socket, *arguments: Any) -> None:
        connection.setblocking(True)  # the session itself may take its time
        loop(connection, *arguments)

    socket.socket, server._serve_loop = _Patient, serve_loop


def main(tracker: str, key: str, host: str, port: str) -> None:
    """Serve in this process until a session takes it down."""
    set_thread_defaults()
    from tvm.rpc import server

    _register()
    serving.register()
    _patient(server)
    first = int(port)
    settings = {"tracker_addr": address(tracker), "key": key, "silent": True}
    state = server.PopenRPCServerState(host, first, first + PORTS, **settings)
    state.thread.join()
    sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
