"""Speaks HTTP with a client: as uvicorn does, but not for ever with one that is slow."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from bertile.server.call import GONE

# How long a connection that waits for a request is kept at the end: what a client has sent by then
# is answered.
LINGER_SECONDS = 0.25
SLOW = (
    b"HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\n"
    b"content-length: 69\r\nconnection: close\r\n\r\n"
    b'{"error":"the request did not arrive in time","error_type":"Timeout"}'
)


class Connection(HttpToolsProtocol):
    """A client's connection. A request has `seconds` to arrive whole, from its first byte on, and
    the first from when the connection is there.
    """

    seconds = 20.0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._slow: asyncio.TimerHandle | None = None
        self._leaving = False
        self._extensions: dict[str, list[Callable[[], None]]] = {GONE: []}

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, error: Exception | None) -> None:
        """Let go of a client."""
        self._stop_waiting()
        super().connection_lost(error)
        for tell in tuple(self._extensions[GONE]):
            tell()

    def data_received(self, data: bytes) -> None:
        """Take what has come; the request that begins with it is waited for."""
        if self._slow is None:
            self._wait()
        super().data_received(data)

    def on_message_begin(self) -> None:
        """Wait for a request that begins within what has come."""
        if self._slow is None:
            self._wait()
        super().on_message_begin()
        self.scope["extensions"] = self._extensions

    def on_headers_complete(self) -> None:
        """Answer a request; at the end, the last of this client."""
        super().on_headers_complete()
        if self._leaving:
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        """A request is there."""
        self._stop_waiting()
        super().on_message_complete()

    def shutdown(self) -> None:
        """Answer what was asked, and what is asked in a moment, then close."""
        self._leaving = True
        if self.cycle is None or self.cycle.response_complete:
            self.loop.call_later(LINGER_SECONDS, self._leave)
        else:
            self.cycle.keep_alive = False

    def _leave(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()

    def _wait(self) -> None:
        self._slow = self.loop.call_later(self.seconds, self._too_slow)

    def _stop_waiting(self) -> None:
        if self._slow is not None:
            self._slow.cancel()
            self._slow = None

    def _too_slow(self) -> None:
        self._slow = None
        if self.transport.is_closing():
            return
        if self.cycle is None or not self.cycle.response_started:
            self.transport.write(SLOW)
        self.transport.close()
