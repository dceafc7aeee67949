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


class Joined:
    """A transport that sends in one go what is written in one turn of the event loop: uvicorn
    writes the head of an answer and its body one after the other.
    """

    def __init__(self, transport: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._pieces: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send bytes, behind those that are still to be sent."""
        if not self._pieces:
            self._loop.call_soon(self._flush)
        self._pieces.append(data)

    def close(self) -> None:
        """Close behind what is still to be sent."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._pieces:
            data = b"".join(self._pieces)
            self._pieces.clear()
            self._transport.write(data)


class Connection(HttpToolsProtocol):
    """A client's connection. A request has `seconds` to arrive whole, from its first byte on, and
    the first from when the connection is there.
    """

    seconds = 20.0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._slow: asyncio.TimerHandle | None = None
        self._arriving = self._leaving = False
        self._extensions: dict[str, list[Callable[[], None]]] = {GONE: []}

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for a request."""
        super().connection_made(Joined(transport, self.loop))
        self._wait()

    def connection_lost(self, error: Exception | None) -> None:
        """Let go of a client."""
        self._stop_waiting()
        super().connection_lost(error)
        for tell in tuple(self._extensions[GONE]):
            tell()

    def data_received(self, data: bytes) -> None:
        """Take what has come; what is still to come of a request is waited for."""
        super().data_received(data)
        if self._slow is None:
            if self._arriving or self._idle:
                self._wait()
        elif not self._arriving and not self._idle:
            self._stop_waiting()

    def on_message_begin(self) -> None:
        """A request begins."""
        self._arriving = True
        super().on_message_begin()
        self.scope["extensions"] = self._extensions

    def on_headers_complete(self) -> None:
        """Answer a request; at the end, the last of this client."""
        super().on_headers_complete()
        if self._leaving:
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        """A request is there."""
        self._arriving = False
        super().on_message_complete()

    def shutdown(self) -> None:
        """Answer what was asked, and what is asked in a moment, then close."""
        self._leaving = True
        if self._idle:
            self.loop.call_later(LINGER_SECONDS, self._leave)
        else:
            self.cycle.keep_alive = False

    @property
    def _idle(self) -> bool:
        """Whether there is no request to be answered."""
        return self.cycle is None or self.cycle.response_complete

    def _leave(self) -> None:
        if self._idle:
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
        if self._idle or not self.cycle.response_started:
            self.transport.write(SLOW)
        self.transport.close()
