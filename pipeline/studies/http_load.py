"""Sends requests to a server on this machine, as many clients would, and keeps what came back.

A loop over raw sockets: the load shares the processor with the server that it measures, and this
takes a tenth of the time of the usual clients in Python. `Traffic.processor_seconds` says how much.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import random
import select
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

HOST = "127.0.0.1"
LOST = 0  # the status of a request whose connection ended before its answer
MOST_CONNECTIONS = 1024  # of the clients that come whether or not others wait
GRACE_SECONDS = 10.0  # for what is under way at the end
SEED = 5


class Reply(NamedTuple):
    """What came back of a request: which of the bodies it had, when it was due (seconds from the
    start), its status, milliseconds from then to the answer's end, and the answer.
    """

    number: int
    due: float
    status: int
    milliseconds: float
    body: bytes


@dataclass
class Traffic:
    """What came of a load: its replies, for how long it sent, and what sending took of a processor.

    `unsent` requests were due while all connections were in use.
    """

    replies: list[Reply] = field(default_factory=list)
    seconds: float = 0.0
    processor_seconds: float = 0.0
    unsent: int = 0

    def statuses(self) -> Counter[int]:
        """How many replies have which status."""
        return Counter(reply.status for reply in self.replies)

    def milliseconds(self, status: int = 200) -> list[float]:
        """Of the replies with that status."""
        return [reply.milliseconds for reply in self.replies if reply.status == status]


def post(path: str, body: bytes, port: int) -> bytes:
    """A request as it goes over the wire."""
    head = f"POST {path} HTTP/1.1\r\nHost: {HOST}:{port}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def closed(port: int, requests: Sequence[bytes], clients: int, seconds: float) -> Traffic:
    """As many clients as that, each of which sends its next request when it has its answer.

    They take the requests in a random order, all of them before one comes again.
    """
    with _quiet(), _Loop(port, requests) as loop:
        began = time.perf_counter()
        for _ in range(clients):
            loop.send(loop.connect(), time.perf_counter() - loop.began)
        while (now := time.perf_counter() - began) < seconds:
            for connection in loop.answered(seconds - now):
                if (due := time.perf_counter() - loop.began) < seconds:
                    loop.send(connection, due)
        return loop.ended(time.perf_counter() - began)


def once_each(port: int, requests: Sequence[bytes], clients: int = 1) -> Traffic:
    """Every request once, by so many clients; the replies are in the order of the requests."""
    with _quiet(), _Loop(port, requests, shuffled=False) as loop:
        left = len(requests)
        waiting = [loop.connect() for _ in range(min(clients, left))]
        began = time.perf_counter()
        while True:
            for connection in waiting:
                if left:
                    loop.send(connection, time.perf_counter() - loop.began)
                    left -= 1
            if not loop.busy:
                break
            waiting = loop.answered(GRACE_SECONDS)
        traffic = loop.ended(time.perf_counter() - began)
        traffic.replies.sort(key=lambda reply: reply.number)
        return traffic


def open_rate(port: int, requests: Sequence[bytes], rate: float, seconds: float) -> Traffic:
    """So many requests a second, however many are under way; times count from when each is due."""
    with _quiet(), _Loop(port, requests, keep_bodies=False) as loop:
        free: deque = deque()
        count = int(rate * seconds)
        sent = unsent = 0
        while sent + unsent < count:
            now = time.perf_counter() - loop.began
            while sent + unsent < count and (due := (sent + unsent) / rate) <= now:
                if not free and len(loop.busy) >= MOST_CONNECTIONS:
                    unsent += 1
                    continue
                loop.send(free.pop() if free else loop.connect(), due)
                sent += 1
            free += loop.answered(max(0.0, (sent + unsent) / rate - now))
        traffic = loop.ended(time.perf_counter() - loop.began)
        traffic.unsent = unsent
        return traffic


@contextlib.contextmanager
def slow_clients(port: int, request: bytes, count: int) -> Iterator[Counter[str]]:
    """So many clients meanwhile, of which each sends a byte of the request a second.

    Counts what becomes of them: the status of an answer, "refused", or still "connected".
    """
    fate: Counter[str] = Counter()
    over = threading.Event()
    sockets = [socket.create_connection((HOST, port)) for _ in range(count)]
    for connection in sockets:
        connection.setblocking(False)

    def trickle() -> None:
        alive = list(sockets)
        for place in itertools.count():
            byte = request[place % len(request) : place % len(request) + 1]
            for connection in list(alive):
                if (end := _dripped(connection, byte)) is not None:
                    fate[end] += 1
                    alive.remove(connection)
            if over.wait(1.0):
                fate["connected"] += len(alive)
                return

    thread = threading.Thread(target=trickle, name="slow-clients")
    thread.start()
    try:
        yield fate
    finally:
        over.set()
        thread.join()
        for connection in sockets:
            connection.close()


def _dripped(connection: socket.socket, byte: bytes) -> str | None:
    """Send a byte; how the server has ended the connection, None where it has not."""
    try:
        answer = connection.recv(4096)
        return answer[9:12].decode() if answer else "refused"
    except BlockingIOError:
        pass  # there is nothing to read, as it should be
    except OSError:
        return "refused"
    try:
        connection.send(byte)
    except OSError:
        return "refused"
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No collection of garbage meanwhile, which would count as the server's time."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class _Connection:
    """A client's connection, and the request that is under way on it."""

    __slots__ = ("buffer", "due", "number", "socket")

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection((HOST, port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer, self.due, self.number = b"", 0.0, -1


class _Loop:
    """Connections to one server, and the replies that came over them."""

    def __init__(
        self, port: int, requests: Sequence[bytes], shuffled: bool = True, keep_bodies: bool = True
    ) -> None:
        self._port, self._requests, self._keep = port, requests, keep_bodies
        self._order = _shuffled(len(requests)) if shuffled else itertools.count()
        self._poll = select.epoll()
        self.busy: dict[int, _Connection] = {}
        self._open: set[_Connection] = set()
        self.traffic = Traffic()
        self._processor_began = time.thread_time()
        self.began = time.perf_counter()

    def __enter__(self) -> _Loop:
        return self

    def __exit__(self, *exception: object) -> None:
        for connection in self._open:
            connection.socket.close()
        self._poll.close()

    def connect(self) -> _Connection:
        """A new connection."""
        connection = _Connection(self._port)
        self._open.add(connection)
        self._poll.register(connection.socket.fileno(), select.EPOLLIN)
        return connection

    def send(self, connection: _Connection, due: float) -> None:
        """Send the next request over a connection that has none under way."""
        connection.number, connection.due = next(self._order), due
        self.busy[connection.socket.fileno()] = connection
        try:
            connection.socket.sendall(self._requests[connection.number])
        except OSError:  # the server has left meanwhile, which `answered` sees
            pass

    def answered(self, seconds: float) -> list[_Connection]:
        """Wait at most so long for answers; connections that can have a next request.

        One that the server has closed is replaced.
        """
        ready = []
        for descriptor, _ in self._poll.poll(seconds):
            connection = self.busy.get(descriptor)
            if connection is None:  # it was idle: the server has closed it
                self._close(next(c for c in self._open if c.socket.fileno() == descriptor))
                continue
            try:
                piece = connection.socket.recv(1 << 16)
            except OSError:
                piece = b""
            connection.buffer += piece
            ends = _ended(connection.buffer) if piece else True
            if ends is None:
                continue
            del self.busy[descriptor]
            self._note(connection, bool(piece))
            if not piece or ends:
                self._close(connection)
                with contextlib.suppress(OSError):  # there may be no server any more
                    ready.append(self.connect())
            else:
                ready.append(connection)
        return ready

    def ended(self, seconds: float) -> Traffic:
        """What came of it all, behind the answers to what is still under way."""
        until = time.perf_counter() + GRACE_SECONDS
        while self.busy and (left := until - time.perf_counter()) > 0:
            self.answered(left)
        for connection in self.busy.values():
            self._note(connection, False)
        self.traffic.seconds = seconds
        self.traffic.processor_seconds = time.thread_time() - self._processor_began
        return self.traffic

    def _note(self, connection: _Connection, whole: bool) -> None:
        milliseconds = (time.perf_counter() - self.began - connection.due) * 1e3
        head, _, body = connection.buffer.partition(b"\r\n\r\n")
        status = int(head[9:12]) if whole else LOST
        connection.buffer = b""
        self.traffic.replies.append(
            Reply(
                connection.number,
                connection.due,
                status,
                milliseconds,
                body if self._keep and whole else b"",
            )
        )

    def _close(self, connection: _Connection) -> None:
        self._open.discard(connection)
        connection.socket.close()  # which takes it off the poll as well


def _ended(buffer: bytes) -> bool | None:
    """None for an answer that is not whole; else whether the server closes behind it."""
    end = buffer.find(b"\r\n\r\n")
    if end < 0:
        return None
    head = buffer[:end].lower()
    start = head.find(b"content-length:")
    if start < 0:
        raise ValueError(f"an answer without Content-Length: {head!r}")
    length = int(head[start + 15 :].split(b"\r\n", 1)[0])
    if len(buffer) < end + 4 + length:
        return None
    return b"connection: close" in head


def _shuffled(count: int) -> Iterator[int]:
    chance = random.Random(SEED)
    while True:
        order = list(range(count))
        chance.shuffle(order)
        yield from order
