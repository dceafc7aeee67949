"""Starts servers in processes of their own, and looks at what they take of the machine."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bertile.base.errors import BertileError
from bertile.bench.engines import Engine
from bertile.studies import server_peers
from bertile.studies.http_load import HOST

READY_SECONDS, END_SECONDS = 120.0, 15.0
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Server:
    """A server that answers on `port`; `process` is the first of its processes."""

    name: str
    port: int
    process: Any

    @property
    def pid(self) -> int:
        """Of the first of its processes."""
        return int(self.process.pid)

    def pids(self) -> list[int]:
        """Its processes: that one, and all below it."""
        parents: dict[int, list[int]] = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
                parents.setdefault(int(fields.split()[1]), []).append(int(stat.parent.name))
        family = [self.pid]
        for pid in family:  # which grows meanwhile
            family += parents.get(pid, ())
        return family

    def processor_seconds(self) -> float:
        """What its processes have taken so far."""
        total = 0
        for pid in self.pids():
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
            fields = stat.rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
        return total / TICKS

    def resident_mb(self, most: bool = False) -> float:
        """What its processes hold, or have held at `most`, in 10**6 bytes."""
        key = "VmHWM" if most else "VmRSS"
        total = 0
        for pid in self.pids():
            status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
            fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
            total += int(fields[key].split()[0]) if key in fields else 0
        return total * 1024 / 1e6

    def info(self) -> dict[str, Any]:
        """What its /info says."""
        return json.loads(self.get("/info"))

    def get(self, path: str) -> bytes:
        """The answer to a GET of that path; OSError for a status other than 2xx."""
        return _get(self.port, path)


@contextlib.contextmanager
def start_bertile(bundle: Path | str | None, *flags: str, quiet: bool = True) -> Iterator[Server]:
    """`bertile serve` on a free port, of a bundle or of what `flags` say.

    BertileError, with what it printed, where it does not start.
    It ends by SIGTERM.
    """
    port = free_port()
    command = [sys.executable, "-m", "bertile", "serve", *([str(bundle)] if bundle else [])]
    command += ["--port", str(port), "--hostname", HOST, *flags, *(["--quiet"] if quiet else [])]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        try:
            try:
                _wait(port, lambda: process.poll() is None)
            except BertileError as error:
                said.seek(0)
                tail = said.read().decode(errors="replace")[-2000:]
                raise BertileError(f"{error.what}: {tail}") from error
            yield Server("bertile", port, process)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(END_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


@contextlib.contextmanager
def start_peer(engine: Engine, threads: int, budget: int) -> Iterator[Server]:
    """A prepared engine behind a plain FastAPI app: `server_peers.serve`."""
    port = free_port()
    context = multiprocessing.get_context("spawn")
    process = context.Process(
        target=server_peers.serve, args=(engine, threads, port, budget), daemon=True
    )
    process.start()
    try:
        _wait(port, process.is_alive)
        yield Server(engine.name, port, process)
    finally:
        process.terminate()
        process.join()


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _get(port: int, path: str) -> bytes:
    with urllib.request.urlopen(f"http://{HOST}:{port}{path}", timeout=10) as answer:
        return answer.read()


def _wait(port: int, alive: Any) -> None:
    """Until the server answers."""
    until = time.monotonic() + READY_SECONDS
    while time.monotonic() < until:
        if not alive():
            raise BertileError("the server has ended")
        try:
            _get(port, "/health")
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise BertileError(f"the server did not answer within {READY_SECONDS:.0f} s")
