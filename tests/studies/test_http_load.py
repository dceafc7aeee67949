"""The load: every request comes back once, with its own answer; what is lost or late is seen."""

from __future__ import annotations

import socketserver
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from bertile.studies import http_load


class Echo(socketserver.StreamRequestHandler):
    """Answers a request with its body, or as the body says."""

    disable_nagle_algorithm = True  # an answer in two pieces would wait for the client otherwise

    def handle(self) -> None:
        while (line := self.rfile.readline()).strip():
            length = 0
            while header := line.strip().lower():
                if header.startswith(b"content-length:"):
                    length = int(header.split(b":")[1])
                line = self.rfile.readline()
            body = self.rfile.read(length)
            if body == b"leave":
                return
            if body == b"wait":
                time.sleep(0.2)
            status = b"429 Too Many Requests" if body == b"refuse" else b"200 OK"
            head = b"HTTP/1.1 %s\r\nContent-Length: %d\r\n" % (status, len(body))
            if body == b"last":
                head += b"Connection: close\r\n"
            self.wfile.write(head + b"\r\n")
            self.wfile.write(body)  # an answer in two pieces
            if body == b"last":
                return


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        """Say what went wrong, unless a client has gone."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


@pytest.fixture
def port() -> Iterator[int]:
    with Server(("127.0.0.1", 0), Echo) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def requests(port: int, *bodies: bytes) -> list[bytes]:
    return [http_load.post("/embed", body, port) for body in bodies]


def test_each_request_is_sent_once_and_has_its_own_answer(port: int) -> None:
    bodies = [b"%d" % number * number for number in range(50)]
    traffic = http_load.once_each(port, requests(port, *bodies), clients=7)
    assert [reply.body for reply in traffic.replies] == bodies
    assert traffic.statuses() == {200: 50} and traffic.processor_seconds > 0


def test_clients_take_all_requests_before_one_comes_again(port: int) -> None:
    bodies = [b"%d" % number for number in range(20)]
    traffic = http_load.closed(port, requests(port, *bodies), clients=4, seconds=0.3)
    numbers = [reply.number for reply in traffic.replies]
    assert len(numbers) > 40 and max(map(numbers.count, range(20))) - len(numbers) // 20 <= 2
    assert all(reply.body == bodies[reply.number] for reply in traffic.replies)


def test_a_connection_that_ends_loses_its_request_alone(port: int) -> None:
    bodies = [b"a", b"leave", b"b", b"last", b"c"]
    traffic = http_load.once_each(port, requests(port, *bodies))
    assert [reply.status for reply in traffic.replies] == [200, http_load.LOST, 200, 200, 200]


def test_a_rate_is_kept_while_others_wait(port: int) -> None:
    traffic = http_load.open_rate(port, requests(port, b"wait", b"refuse"), rate=100, seconds=0.5)
    assert traffic.statuses() == {200: 25, 429: 25} and traffic.unsent == 0
    assert min(traffic.milliseconds(200)) >= 200 > min(traffic.milliseconds(429))
    due = [reply.due for reply in sorted(traffic.replies, key=lambda reply: reply.due)]
    assert due == pytest.approx([number / 100 for number in range(50)])


def test_what_cannot_be_sent_in_time_is_counted(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_load, "MOST_CONNECTIONS", 2)
    traffic = http_load.open_rate(port, requests(port, b"wait"), rate=50, seconds=0.2)
    assert traffic.unsent == 8 and traffic.statuses() == {200: 2}


def test_slow_clients_are_seen_to_be_answered_or_sent_away(port: int) -> None:
    request = http_load.post("/", b"", port)
    with http_load.slow_clients(port, request, 3) as fate:
        traffic = http_load.once_each(port, requests(port, b"a"))
    assert traffic.statuses() == {200: 1} and fate == {"connected": 3}
