"""Writes a line of JSON a request, without ever keeping a request waiting for it."""

from __future__ import annotations

import asyncio
import os
import threading
from queue import Full, Queue
from typing import Any

import orjson

FLUSH_SECONDS = 0.05
WAITING_PIECES = 256  # of lines; what comes while a reader does not read is counted alone


class RequestLog:
    """Lines to the file descriptor `descriptor`, some of them at a time, by a thread of its own."""

    def __init__(self, descriptor: int = 2) -> None:
        self._descriptor = descriptor
        self._lines: list[bytes] = []
        self._left_out = 0
        self._pieces: Queue[bytes | None] = Queue(WAITING_PIECES)
        self._thread: threading.Thread | None = None

    def write(self, record: dict[str, Any]) -> None:
        """Log a record; in the event loop."""
        if not self._lines:
            asyncio.get_running_loop().call_later(FLUSH_SECONDS, self.flush)
        self._lines.append(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))

    def flush(self) -> None:
        """Hand the lines to the thread, or leave them out where it has too many."""
        self._hand_over(0.0)

    def close(self, seconds: float = 1.0) -> None:
        """Write what is left, if somebody reads it in time."""
        self._hand_over(seconds)
        if self._thread is not None:
            try:
                self._pieces.put(None, timeout=seconds)
            except Full:
                return
            self._thread.join(seconds)
            self._thread = None

    def _hand_over(self, seconds: float) -> None:
        lines, self._lines = self._lines, []
        if not lines and not self._left_out:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._write, name="bertile-log", daemon=True)
            self._thread.start()
        notice = b""
        if self._left_out:
            notice = orjson.dumps({"log_lines_left_out": self._left_out}) + b"\n"
        try:
            self._pieces.put(b"".join((*lines, notice)), block=seconds > 0, timeout=seconds or None)
            self._left_out = 0
        except Full:
            self._left_out += len(lines)

    def _write(self) -> None:
        while (piece := self._pieces.get()) is not None:
            try:
                while piece:
                    piece = piece[os.write(self._descriptor, piece) :]
            except OSError:  # nobody reads any more: there is no place to say so
                return
