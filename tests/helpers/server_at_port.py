"""Serves an application on a port of this machine, in a thread, for clients that want a URL."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def at_port(app: Any) -> Iterator[int]:
    """The port that an application answers on meanwhile."""
    import uvicorn

    config = uvicorn.Config(app, log_level="error", ws="none", lifespan="on", timeout_keep_alive=2)
    server = uvicorn.Server(config)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                thread.join(0.01)
                assert thread.is_alive(), "the server did not start"
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()
