"""Tries, on the GPU of a device that serves tuners, the compiled candidates that a session brings.

Of each session TVM makes a process. The one that tries candidates belongs to none of them: it
outlives them, with the driver open and a task's reference made. A kernel that fails takes it down,
not the server.
"""

from __future__ import annotations

import json
import os
from multiprocessing import AuthenticationError, current_process
from multiprocessing.connection import Client, Listener
from threading import Thread
from typing import Any

from bertile.targets.rows import resolve
from bertile.tune.measure.cuda.measure import TRIAL_SECONDS
from bertile.tune.measure.trial_runner import TrialRunner

NAME = "bertile.gpu_trial"


def register() -> None:
    """Give sessions of this process the function ``NAME``: the request of ``cuda.trial`` as JSON,
    and the name of the file that was sent before; JSON comes back.
    """
    import tvm

    place, key = f"\0bertile-{os.getpid()}", bytes(current_process().authkey)
    listener = Listener(place, "AF_UNIX", authkey=key)
    Thread(target=_serve, args=(listener,), daemon=True).start()

    @tvm.register_global_func(NAME, override=True)
    def gpu_trial(request: str, image: str) -> str:
        path = tvm.get_global_func("tvm.rpc.server.workpath")(image)
        with Client(place, "AF_UNIX", authkey=key) as server:
            server.send_bytes(json.dumps({**json.loads(request), "image": path}).encode())
            return server.recv_bytes().decode()


def _serve(listener: Listener) -> None:
    """Answer sessions, one after the other, as long as this process lives."""
    trials: TrialRunner | None = None
    while True:
        try:
            with listener.accept() as session:
                request = json.loads(session.recv_bytes())
                try:
                    trials = trials or _trials(request)
                    answer = trials.ask(request)
                except Exception as error:  # another tuner's request may be a better one
                    answer = {"error": f"{type(error).__name__}: {error}"}
                session.send_bytes(json.dumps(answer).encode())
        except (OSError, EOFError, AuthenticationError):
            continue  # the session has ended before its trial


def _trials(request: dict[str, Any]) -> TrialRunner:
    row = resolve(request["target"], request["threads"])
    return TrialRunner(row, TRIAL_SECONDS, ("bertile.tune.measure.cuda.trial",))
