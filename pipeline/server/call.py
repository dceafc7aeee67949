"""Reads a request: its body within the limits, its id, its deadline, and whether it may be made."""

from __future__ import annotations

import asyncio
import hmac
import random
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any

from bertile.server import errors
from bertile.server.catalogue import Served
from bertile.server.errors import Refusal
from bertile.server.scheduler import Work

Receive = Callable[[], Awaitable[dict[str, Any]]]
# How many seconds an answer is of use, by the headers that say so: our own, and that which Envoy
# sets for the service behind it.
DEADLINES = {b"x-request-timeout": 1.0, b"x-envoy-expected-rq-timeout-ms": 0.001}
# Where the server does not tell when a client goes away, who waits longer is asked whether it is
# still there; before, the work is done sooner than that would pay.
PATIENCE_SECONDS = 0.1
# The extension of a scope by which a request is told that its client has gone: a list of functions.
GONE = "bertile.gone"
IDENTITY = re.compile(rb"[!-~]{1,128}")
JSON_TYPES = (b"application/json", b"text/json")


class Held:
    """How many bytes of large bodies are in the house, of which there may be `most`.

    A body that comes in one piece, as all small ones do, is not counted.
    """

    def __init__(self, most: int) -> None:
        self.bytes, self.most = 0, most

    def take(self, count: int) -> int:
        """Hold so many more, and give their number; Refusal where that is too much."""
        if self.bytes + count > self.most:
            raise Refusal(errors.OVERLOADED, "Model is overloaded", retry_after=1)
        self.bytes += count
        return count


class Call:
    """A request on its way through the server.

    `model` is the name in its path, `method` "single" or "batch", as its texts are, `work` what it
    has the model do, and `served` the name of the model that did. `deadline` is a
    `time.monotonic()`.
    """

    __slots__ = (
        "_gone",
        "_holds",
        "_receive",
        "_timers",
        "_watching",
        "body",
        "deadline",
        "headers",
        "identity",
        "method",
        "model",
        "path_params",
        "scope",
        "served",
        "started",
        "work",
    )

    def __init__(self, scope: dict[str, Any], receive: Receive) -> None:
        self.started = time.monotonic()
        self.scope, self._receive = scope, receive
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        identity = self.headers.get(b"x-request-id", b"")
        if not IDENTITY.fullmatch(identity):
            identity = b"%016x" % random.getrandbits(64)
        self.identity = identity
        self.path_params: dict[str, Any] = scope.get("path_params") or {}
        self.model: str | None = self.path_params.get("model")
        self.method = "single"
        self.served: Served | None = None
        self.body, self._holds = b"", 0
        self.work: Work | None = None
        extensions = scope.get("extensions")
        # of functions that are called when the client goes away; None where nobody calls them
        self._gone: list[Callable[[], None]] | None = extensions and extensions.get(GONE)
        self._timers: tuple[asyncio.TimerHandle, ...] = ()
        self._watching: asyncio.Task[None] | None = None
        self.deadline: float | None = None

    def read_deadline(self) -> None:
        """Read until when an answer is of use; Refusal for a header that is no number."""
        for name, unit in DEADLINES.items():
            value = self.headers.get(name)
            if value is None:
                continue
            try:
                seconds = float(value) * unit
            except ValueError:
                seconds = -1.0
            if not 0 < seconds < float("inf"):
                raise Refusal(errors.MALFORMED, f"the header {name.decode()} is no time")
            self.deadline = self.started + seconds
            return

    def check_key(self, key: str | None) -> None:
        """Raise Refusal unless the request shows the key, where there is one."""
        if key is None:
            return
        shown = self.headers.get(b"authorization", b"")
        if not hmac.compare_digest(shown, b"Bearer " + key.encode()):
            raise Refusal(errors.UNAUTHORIZED, "the API key is missing or wrong")

    def check_json(self) -> None:
        """Raise Refusal for a body that is said to be something else than JSON."""
        content_type = self.headers.get(b"content-type")
        if content_type is None:
            return
        kind = content_type.partition(b";")[0].strip().lower()
        if kind not in JSON_TYPES and not kind.endswith(b"+json"):
            raise Refusal(
                errors.WRONG_FORM, "Expected request with `Content-Type: application/json`"
            )

    async def read(self, most: int, held: Held) -> bytes:
        """The body; Refusal for more than `most` bytes, where `held` has no room for a large one,
        and where the client goes away.
        """
        said = self.headers.get(b"content-length")
        if said is not None and said.isdigit() and int(said) > most:
            raise _too_large(most)
        message = await self._receive()
        body = message.get("body", b"")
        if message.get("more_body"):
            pieces, length = [body], len(body)
            while message.get("more_body"):
                message = await self._receive()
                piece = message.get("body", b"")
                pieces.append(piece)
                length += len(piece)
                if length > most:
                    raise _too_large(most)
                self._holds += held.take(len(piece))
            body = b"".join(pieces)
        if message["type"] == "http.disconnect":
            raise Refusal(errors.CLIENT_GONE, "the client went away")
        if len(body) > most:
            raise _too_large(most)
        self.body = body
        self.started = time.monotonic()  # what a slow client took is not the server's time
        return body

    def give_back(self, held: Held) -> None:
        """Hold no bytes any more."""
        if self._holds:
            held.bytes -= self._holds
            self._holds = 0

    def look_after(self, work: Work, loop: asyncio.AbstractEventLoop) -> None:
        """Refuse a work when its deadline is over or its client gone, until `let_go`."""
        if self._gone is not None:
            self._gone.append(work.leave)
        else:
            self._timers = (loop.call_later(PATIENCE_SECONDS, self._ask_for_client, work, loop),)
        if self.deadline is not None:
            left = max(0.0, self.deadline - time.monotonic())
            self._timers += (loop.call_later(left, work.expire),)

    def let_go(self) -> None:
        """Look after it no more."""
        if self._gone is not None:
            self._gone.remove(self.work.leave)
        for timer in self._timers:
            timer.cancel()
        if self._watching is not None:
            self._watching.cancel()

    def _ask_for_client(self, work: Work, loop: asyncio.AbstractEventLoop) -> None:
        self._watching = loop.create_task(self._wait_for_end(work))

    async def _wait_for_end(self, work: Work) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        work.leave()


def _too_large(most: int) -> Refusal:
    return Refusal(errors.TOO_LARGE, f"the body has more than {most} bytes")
