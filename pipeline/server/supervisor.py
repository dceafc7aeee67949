"""Keeps one serving process alive: opens the port, starts it, and starts it anew when it dies.

This process has no model and no thread, and waits for signals alone. Connections that come while
there is no serving process wait in the socket's queue. What this process needs is in Python itself.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from bertile.base.errors import PlatformError

SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}
BACKLOG = 2048
# A process that dies sooner after its start than this, and did so before, is started after a pause.
SHORT_LIFE_SECONDS = 5.0
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds


def listen(hostname: str, port: int) -> socket.socket:
    """A socket that listens; PlatformError for an address that cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            hostname, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        raise PlatformError(
            f"cannot listen on {hostname}:{port}: {error.strerror or error}",
            "choose another --port, or end what has it",
        ) from error
    return listener


def address_of(listener: socket.socket) -> str:
    """Where a socket listens, as a URL."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Supervisor:
    """Runs `bertile.server.process` on a socket; `start` is what it is told, see `process.serve`.

    `say` is told what happens, in lines.
    """

    def __init__(
        self, listener: socket.socket, start: dict[str, Any], say: Callable[[str], None]
    ) -> None:
        self._listener, self._start, self._say = listener, start, say
        self._memory = tempfile.TemporaryFile()
        self._child: subprocess.Popen[bytes] | None = None
        self._began = self._pause = 0.0
        self._stopping = self._was_ready = False
        self._ready, self._lifeline = -1, -1

    def run(self) -> int:
        """Serve until a signal ends it; gives the exit code.

        SIGTERM and Ctrl-C end it in grace, a second of them at once; SIGHUP reads the models again.
        """
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            self._begin()
            while True:
                number = signal.sigwait(SIGNALS)
                if number == signal.SIGCHLD:
                    code = self._child.poll()
                    if code is None:
                        continue
                    if self._over(code) or self._stopped_while_pausing():
                        return code if code >= 0 else 128 - code
                    self._begin()
                else:
                    self._forward(number)
        finally:
            if self._child is not None and self._child.poll() is None:
                self._child.kill()
                self._child.wait()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _forward(self, number: int) -> None:
        if number != signal.SIGHUP and not self._stopping:
            self._stopping = True
            self._listener.close()  # the serving process has its own: it takes what has connected
        self._child.send_signal(number)

    def _over(self, code: int) -> bool:
        """Whether all is over when the serving process has ended so."""
        os.close(self._lifeline)
        was_ready = bool(os.read(self._ready, 1))
        os.close(self._ready)
        self._was_ready |= was_ready
        if self._stopping or not self._was_ready:  # what has never served will not serve now
            return True
        lived = time.monotonic() - self._began
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        self._say(f"the serving process ended with {how} and is started anew")
        self._pause = 0.0 if lived > SHORT_LIFE_SECONDS else min(2 * self._pause + 1, LONGEST_PAUSE)
        return False

    def _stopped_while_pausing(self) -> bool:
        """Pause where the process keeps dying; whether it was to end meanwhile."""
        if self._pause <= FIRST_PAUSE:  # the first time it is started at once
            return False
        number = signal.sigtimedwait({signal.SIGTERM, signal.SIGINT}, self._pause)
        return number is not None

    def _begin(self) -> None:
        """Start the serving process."""
        read, self._lifeline = os.pipe()
        self._ready, ready = os.pipe()
        inherited = (self._listener.fileno(), read, ready, self._memory.fileno())
        for descriptor in inherited:
            os.set_inheritable(descriptor, True)
        kept = self._memory_of_models()
        start = {
            **self._start,
            **({"models": kept} if kept else {}),
            "socket": inherited[0],
            "parent": read,
            "ready": ready,
            "memory": inherited[3],
            "address": address_of(self._listener),
        }
        self._began = time.monotonic()
        self._child = subprocess.Popen(
            [sys.executable, "-m", "bertile.server.process"],
            stdin=subprocess.PIPE,
            pass_fds=inherited,
            start_new_session=True,  # else Ctrl-C comes to it twice
        )
        os.close(read)
        os.close(ready)
        self._child.stdin.write(json.dumps(start).encode() + b"\n")
        self._child.stdin.close()

    def _memory_of_models(self) -> dict[str, str]:
        """What the last serving process had, if it had other models than it began with."""
        self._memory.seek(0)
        text = self._memory.read()
        try:
            return json.loads(text) if text else {}
        except ValueError:  # it died while it wrote
            return {}
