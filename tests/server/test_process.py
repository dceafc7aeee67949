"""`bertile serve` answers, ends in grace, survives its serving process, and waits for no one."""

from __future__ import annotations

import http.client
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="the server needs the extra serve")
from helpers import server_processes
from helpers.server_processes import ServerProcess, running, vectors_of

CLOSE = dict(rtol=1e-5, atol=1e-5)
TEXT = "the cat sat on a mat"


@pytest.fixture(scope="module")
def bundle(stages: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return server_processes.write_bundle(tmp_path_factory.mktemp("bundles") / "tiny", stages)


class Client(threading.Thread):
    """Asks again and again until nobody listens; counts answers, and requests without one."""

    def __init__(self, server: ServerProcess, number: int) -> None:
        super().__init__(daemon=True)
        self.server, self.text = server, " ".join(["the", "cat"] * (number + 1))
        self.answers = self.lost = 0
        self.wrong: list[str] = []
        self.start()

    def run(self) -> None:
        """Ask until the server is gone."""
        want = vectors_of(self.text)
        connection = self.server.connect()
        while True:
            try:
                connection.connect() if connection.sock is None else None
            except ConnectionRefusedError:
                return
            try:
                answer = self.server.ask(self.text, connection)
            except (OSError, http.client.HTTPException) as error:
                self.lost += 1
                self.wrong.append(repr(error))
                return
            if not np.allclose(answer[0], want, **CLOSE):
                self.wrong.append("another answer")
            self.answers += 1


def test_end_in_the_middle_loses_no_request_and_a_killed_process_is_replaced(bundle) -> None:
    with running(bundle) as server:
        np.testing.assert_allclose(server.ask(TEXT)[0], vectors_of(TEXT), **CLOSE)
        assert server.get("/v1/models")["data"][0]["id"] == "tiny"
        before = server.serving_process()
        os.kill(before, signal.SIGKILL)
        np.testing.assert_allclose(server.ask(TEXT)[0], vectors_of(TEXT), **CLOSE)
        assert server.serving_process() != before
        clients = [Client(server, number) for number in range(8)]
        time.sleep(0.3)
        assert server.stop() == 0
        for client in clients:
            client.join(20)
        assert not any(client.is_alive() for client in clients)
        assert [client.wrong for client in clients if client.wrong] == []
        assert all(client.answers for client in clients)
    assert any("started anew" in line for line in server.said)


@pytest.mark.slow  # starts a process of its own
def test_list_of_models_is_read_again_on_a_signal(bundle, tmp_path) -> None:
    listed = tmp_path / "models.txt"
    listed.write_text(f"first={bundle}  # a comment\n")
    with running("--models", listed) as server:
        assert [model["id"] for model in server.get("/v1/models")["data"]] == ["first"]
        listed.write_text(f"second={bundle}\nfirst={bundle}\n")
        server.send(signal.SIGHUP)
        end = time.monotonic() + 20
        while len(server.get("/v1/models")["data"]) < 2:
            assert time.monotonic() < end, server.said
            time.sleep(0.02)
        os.kill(server.serving_process(), signal.SIGKILL)  # the next knows them too
        assert len(server.get("/v1/models")["data"]) == 2
        assert server.stop(signal.SIGINT) == 0


@pytest.mark.slow  # starts a process of its own
def test_slow_clients_are_told_and_stop_nobody(bundle) -> None:
    with running(bundle, "--header-timeout", "0.5", "--max-concurrent-requests", "2") as server:
        begun = b"POST /embed_all HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n"
        slow = [server.plain() for _ in range(30)]
        for number, client in enumerate(slow):
            client.sendall(begun if number % 2 else begun + b"\r\n{")
        for _ in range(3):  # none of them has a place of the two
            np.testing.assert_allclose(server.ask(TEXT)[0], vectors_of(TEXT), **CLOSE)
        for client in slow:
            assert client.makefile("rb").readline().startswith(b"HTTP/1.1 408 ")
            client.close()
        assert server.stop() == 0


@pytest.mark.slow  # starts a process of its own
def test_second_signal_ends_it_at_once(bundle) -> None:
    with running(bundle, "--grace", "60") as server:
        waiting = server.plain()
        waiting.sendall(b"POST /embed_all HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n")
        server.ask(TEXT)  # behind it: the head is read
        server.send(signal.SIGTERM)
        with pytest.raises(ConnectionRefusedError):
            while True:
                server.plain().close()
                time.sleep(0.01)
        assert server.process.poll() is None
        assert server.stop() == 128 + signal.SIGTERM
