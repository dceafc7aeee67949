"""Serves models on a socket that its parent opened, in a process that may die: the parent starts it
anew.

It ends when it is told to, or when the parent is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any

import uvicorn
import uvloop

from bertile.base.errors import BertileError
from bertile.server.application import application
from bertile.server.connection import Connection
from bertile.server.model_list import read_list
from bertile.server.settings import Settings

LOG = logging.getLogger("bertile")
STOPS = (signal.SIGTERM, signal.SIGINT)
# A thread that wants the interpreter gets it after so long: the event loop is not to wait for one
# that makes arrays, nor a model's thread for a burst of requests.
SWITCH_SECONDS = 0.001
TICK_SECONDS = 0.02
MOST_FILES = 1 << 16


class Server(uvicorn.Server):
    """uvicorn's server on sockets that are open already, which loses no request at its end."""

    def __init__(self, config: uvicorn.Config, service: Any, grace: float) -> None:
        super().__init__(config)
        self._service, self._grace = service, grace
        self.late = 0  # connections that were not done when the grace was over

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to `serve`."""
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept what has connected, answer what is asked, then close; at most for the grace."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self._grace
        self._service.stopping = True
        waiting = [listener.dup() for listener in sockets or ()]
        for server in self.servers:
            server.close()
        for listener in waiting:
            await self._accept_all(listener)
        connections = self.server_state.connections
        for connection in list(connections):
            connection.shutdown()
        while connections and loop.time() < end:
            await asyncio.sleep(TICK_SECONDS)
        self.late = len(connections)
        for connection in list(connections):
            connection.transport.abort()

    async def _accept_all(self, listener: socket.socket) -> None:
        """Take the connections that wait in a socket's queue, then close it."""
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        with contextlib.closing(listener):
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:  # there is none left
                    return
                client.setblocking(False)
                await loop.connect_accepted_socket(self._connection, client)

    def _connection(self) -> Connection:
        return Connection(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )


async def serve(start: dict[str, Any]) -> int:
    """Serve until a signal says to stop, or the parent is gone; gives the exit code.

    `start` has "settings", the "models" by name, the "models_file" that SIGHUP reads again, and the
    file descriptors of the "socket", of the "parent" and of the "memory" of what is served.
    """
    settings = Settings(**start["settings"])
    loop = asyncio.get_running_loop()
    memory = start.get("memory")
    app = application(
        start["models"],
        settings,
        remember=None if memory is None else lambda names: _remember(memory, names),
    )
    service = app.service
    listener = socket.socket(fileno=start["socket"])
    # a class of this server's own, so that two servers of one process differ
    connection = type("Connection", (Connection,), {"seconds": settings.header_timeout})
    config = uvicorn.Config(
        app,
        http=connection,
        ws="none",
        lifespan="off",  # which is entered here, where its errors are told in a sentence
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=settings.keep_alive,
        backlog=2048,
    )
    server = Server(config, service, settings.grace)

    def stop(number: int) -> None:
        if server.should_exit:  # a second time: at once
            os._exit(128 + number)
        server.should_exit = True

    for number in STOPS:
        loop.add_signal_handler(number, stop, number)
    reading: set[asyncio.Task[None]] = set()

    def reread() -> None:
        task = loop.create_task(_reread(service, start))
        reading.add(task)
        task.add_done_callback(reading.discard)

    loop.add_signal_handler(signal.SIGHUP, reread)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the parent has blocked what it waits for
    if (parent := start.get("parent")) is not None:
        # which ends without a word when the parent does
        loop.add_reader(parent, lambda: (loop.remove_reader(parent), stop(signal.SIGTERM)))
    async with app.router.lifespan_context(app):
        gc.collect()
        gc.freeze()  # what is there now stays: no collection has to look at it again
        ready = loop.create_task(_say_ready(server, service, start))
        await server.serve(sockets=[listener])
        ready.cancel()
        if server.late:
            LOG.warning("%d requests were not answered within the grace", server.late)
            os._exit(1)  # the models are still at work for them
    return 0


async def _reread(service: Any, start: dict[str, Any]) -> None:
    """Serve what the list says now, and what lies now in the directories."""
    try:
        names = read_list(start["models_file"]) if start.get("models_file") else start["models"]
        done = await service.models.become(names)
    except BertileError as error:
        LOG.error("the list of models is not taken: %s", error)
        return
    for name, what in done.items():
        LOG.warning("%s: %s", name, what)
    service.changed()


async def _say_ready(server: Server, service: Any, start: dict[str, Any]) -> None:
    while not server.started:
        await asyncio.sleep(TICK_SECONDS)
    for served in service.models:
        about = served.described()
        LOG.warning(
            "%s is %s (%s, %s for %s, %s, at most %d tokens a call)",
            served.name,
            served.directory,
            served.kind,
            about["precision"],
            about["target"],
            "tuned" if about["tuned"] else "not tuned",
            served.max_batch_tokens,
        )
    LOG.warning("ready on %s", start["address"])
    if start.get("ready") is not None:
        os.write(start["ready"], b"\n")


def _remember(memory: int, names: dict[str, str]) -> None:
    """Write what is served, for the process that may have to go on."""
    text = json.dumps(names).encode()
    os.pwrite(memory, text, 0)
    os.ftruncate(memory, len(text))


def main() -> int:
    """Serve what the first line of standard input says; gives the exit code."""
    logging.basicConfig(level=logging.WARNING, format="bertile: %(message)s", stream=sys.stderr)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # threads of ours do that
    sys.setswitchinterval(SWITCH_SECONDS)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)  # a connection is a file
    soft = MOST_FILES if most == resource.RLIM_INFINITY else min(most, MOST_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, most))
    start = json.loads(sys.stdin.readline())
    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(serve(start))
    except BertileError as error:
        print(f"bertile: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
