"""Lines are written whole and in order, and nobody waits for who does not read them."""

from __future__ import annotations

import asyncio
import json
import os
import threading

import pytest

pytest.importorskip("orjson", reason="the server needs the extra serve")

from bertile.server import request_log
from bertile.server.request_log import RequestLog


def test_lines_are_whole_and_in_order() -> None:
    read, write = os.pipe()
    log = RequestLog(write)

    async def fill() -> None:
        for number in range(300):
            log.write({"number": number})
            if number % 100 == 0:
                log.flush()
                await asyncio.sleep(0)

    asyncio.run(fill())
    log.close()
    os.close(write)
    with os.fdopen(read) as lines:
        assert [json.loads(line)["number"] for line in lines] == list(range(300))


def test_who_does_not_read_keeps_nobody_waiting(monkeypatch) -> None:
    monkeypatch.setattr(request_log, "WAITING_PIECES", 2)
    read, write = os.pipe()
    log = RequestLog(write)
    text = "x" * 200_000  # more than a pipe holds

    async def fill() -> None:
        for number in range(10):
            log.write({"number": number, "text": text})
            log.flush()

    asyncio.run(asyncio.wait_for(fill(), 10))
    with os.fdopen(read, "rb") as lines:
        first = [json.loads(lines.readline()) for _ in range(2)]  # room again
        closing = threading.Thread(target=lambda: (log.close(10), os.close(write)))
        closing.start()
        rest = [json.loads(line) for line in lines]
        closing.join(10)
    left_out = sum(line.get("log_lines_left_out", 0) for line in rest)
    numbers = [line["number"] for line in (*first, *rest) if "number" in line]
    assert left_out >= 6 and len(numbers) + left_out == 10
    assert numbers == list(range(len(numbers)))
