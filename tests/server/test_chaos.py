"""What is done to a server while it is under load: no request is lost that could be answered."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bertile.studies import http_load
from bertile.studies.http_load import LOST, Traffic

pytestmark = pytest.mark.slow
CLIENTS = 16
LONG_TEXT = "the old cat lives in paris and reads a very good book . " * 20
REQUESTS = [
    json.dumps({"inputs": text}).encode()
    for text in ("a cat", "the old film " * 9, LONG_TEXT, "paris", ["a list", "of texts"] * 8)
]


@pytest.fixture(scope="module")
def bundle(stages: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniLM in int8."""
    from bertile import driver
    from bertile.config import Config

    path = tmp_path_factory.mktemp("bundle") / "minilm"
    driver.compile("minilm", path, Config(precision="int8", cache_dir=stages))
    return path


@pytest.fixture(scope="module")
def start() -> Callable[..., Any]:
    """What starts a server in processes of its own."""
    pytest.importorskip("uvicorn", reason="the server needs the extra serve")
    from bertile.studies.serving_processes import start_bertile

    return start_bertile


def requests(port: int) -> list[bytes]:
    return [http_load.post("/embed", body, port) for body in REQUESTS]


class Load:
    """Clients at work for `seconds`, in another thread."""

    def __init__(self, port: int, seconds: float, clients: int = CLIENTS) -> None:
        self._outcome: list[Traffic] = []
        self._thread = threading.Thread(
            target=lambda: self._outcome.append(
                http_load.closed(port, requests(port), clients, seconds)
            )
        )
        self.began = time.perf_counter()
        self._thread.start()

    def ended(self) -> Traffic:
        """What came of it."""
        self._thread.join()
        return self._outcome[0]


def metrics(server: Any, *words: str) -> float:
    """The sum of the samples whose lines have all these words."""
    lines = server.get("/metrics").decode().splitlines()
    rows = [line for line in lines if line[:1] != "#" and all(word in line for word in words)]
    return sum(float(row.rpartition(" ")[2]) for row in rows)


def post(port: int, path: str, body: Any, **headers: str) -> Any:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", **headers},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_sigterm_in_the_middle_loses_no_accepted_request(bundle: Path, start: Any) -> None:
    answered = 0
    for turn in range(20):
        with start(bundle, "--max-batch-tokens", "256") as server:
            load = Load(server.port, 1.5)
            time.sleep(0.3 + 0.013 * turn)
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(20) == 0
            statuses = load.ended().statuses()
        assert set(statuses) == {200}, (turn, statuses)
        answered += statuses[200]
    assert answered > 20 * CLIENTS


def test_a_killed_process_loses_what_is_under_way_at_most(bundle: Path, start: Any) -> None:
    with start(bundle, "--max-batch-tokens", "256") as server:
        first = set(server.pids())
        load = Load(server.port, 12.0)
        time.sleep(1.0)
        (child,) = first - {server.pid}
        os.kill(child, signal.SIGKILL)
        traffic = load.ended()
        assert set(server.pids()) & first == {server.pid} and len(server.pids()) == 2
    statuses = traffic.statuses()
    assert set(statuses) <= {200, LOST} and statuses[LOST] <= CLIENTS
    last_lost = max((reply.due for reply in traffic.replies if reply.status == LOST), default=0.0)
    assert last_lost < 2.0  # what was sent from then on was answered by the next process
    assert sum(reply.due > last_lost for reply in traffic.replies) > CLIENTS


def test_work_of_clients_that_go_away_is_dropped(bundle: Path, start: Any) -> None:
    count, texts = 40, 32
    body = json.dumps({"inputs": [LONG_TEXT] * texts}).encode()
    with start(bundle, "--max-batch-tokens", "256") as server:
        connections = []
        for _ in range(count):
            connections.append(socket.create_connection(("127.0.0.1", server.port)))
            connections[-1].sendall(http_load.post("/embed", body, server.port))
        time.sleep(0.4)
        for connection in connections:
            connection.close()
        began = time.perf_counter()
        assert len(post(server.port, "/embed", {"inputs": "a cat"})) == 1
        seconds = time.perf_counter() - began
        ran = metrics(server, "te_request_input_length_count")
        assert metrics(server, "te_request_failure", "dropped") > count / 2
        assert ran < count * texts / 2 and seconds < 2.0
        assert metrics(server, "bertile_requests_in_house") == 0


def test_models_are_exchanged_under_load_without_a_loss(
    bundle: Path, start: Any, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(bundle, other)
    flags = ("--max-batch-tokens", "256", "--admin-key", "a key")
    with start(f"minilm={bundle}", *flags) as server:
        load = Load(server.port, 6.0)
        for directory in (other, bundle, other, bundle):
            time.sleep(0.7)
            body = {"name": "minilm", "directory": str(directory)}
            answer = post(server.port, "/models", body, Authorization="Bearer a key")
            assert answer["models"] == ["minilm"]
        statuses = load.ended().statuses()
    assert set(statuses) == {200} and statuses[200] > 4 * CLIENTS


def test_sighup_reads_the_list_again_under_load(bundle: Path, start: Any, tmp_path: Path) -> None:
    names = tmp_path / "models"
    names.write_text(f"minilm={bundle}\n")
    flags = ("--models", str(names), "--max-batch-tokens", "256")
    with start(None, *flags) as server:
        load = Load(server.port, 4.0)
        names.write_text(f"minilm={bundle}\nsecond={bundle}\n")
        server.process.send_signal(signal.SIGHUP)
        until = time.monotonic() + 20
        while server.info()["models"] != ["minilm", "second"]:
            assert time.monotonic() < until
            time.sleep(0.1)
        statuses = load.ended().statuses()
    assert set(statuses) == {200}


def test_slow_clients_stop_nobody_and_are_sent_away(bundle: Path, start: Any) -> None:
    flags = ("--max-batch-tokens", "256", "--header-timeout", "3")
    with start(bundle, *flags) as server:
        request = requests(server.port)[2]
        with http_load.slow_clients(server.port, request, 200) as fate:
            traffic = Load(server.port, 6.0).ended()
        statuses = traffic.statuses()
        assert set(statuses) == {200} and statuses[200] > 20 * CLIENTS
        assert fate["connected"] == 0 and sum(fate.values()) == 200
