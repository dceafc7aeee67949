"""Starts `bertile serve` as people do, and speaks to it over sockets."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from helpers import tiny_bundle

from bertile.bundle import writer

START_SECONDS = 300  # of a model that is compiled first
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat", "on", "a", "mat")


def write_bundle(directory: Path, stages: str) -> Path:
    """The bundle of a tiny encoder that numpy can compute too, with a tokenizer of some words."""
    import tokenizers

    library = tiny_bundle.library(stages)
    writer.write(tiny_bundle.MANIFEST, library, tiny_bundle.PARAMS, [], directory)
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def vectors_of(text: str) -> np.ndarray:
    """What the tiny encoder says of a text's tokens, (tokens, 8), by numpy."""
    ids = [WORDS.index(word) if word in WORDS else 1 for word in text.split()]
    return tiny_bundle.expected([[2, *ids, 3]])["hidden"][0]


class ServerProcess:
    """A running `bertile serve`; `said` are the lines of its stderr so far."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "bertile", "serve", *arguments, "--port", "0"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.said: list[str] = []
        self.port = 0
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._ready.wait(START_SECONDS) and self.port, "\n".join(self.said)

    def _read(self) -> None:
        for line in self.process.stderr:
            self.said.append(line.rstrip())
            if match := re.search(r"ready on http://127\.0\.0\.1:(\d+)", line):
                self.port = int(match[1])
                self._ready.set()
        self._ready.set()

    def serving_process(self) -> int:
        """The number of the process that has the models."""
        tasks = Path(f"/proc/{self.process.pid}/task")
        numbers = (task / "children" for task in tasks.iterdir())
        return int(" ".join(path.read_text() for path in numbers).split()[0])

    def connect(self) -> http.client.HTTPConnection:
        """A connection of a client."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=START_SECONDS)

    def plain(self) -> socket.socket:
        """A connection of a client that speaks by itself."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=START_SECONDS)

    def ask(self, text: Any, connection: http.client.HTTPConnection | None = None) -> Any:
        """The vectors of the tokens of a text."""
        own = connection or self.connect()
        body = json.dumps({"inputs": text})
        own.request("POST", "/embed_all", body, {"content-type": "application/json"})
        response = own.getresponse()
        answer = response.read()
        if connection is None:
            own.close()
        assert response.status == 200, answer
        return json.loads(answer)

    def get(self, path: str) -> Any:
        """The JSON at a path."""
        connection = self.connect()
        connection.request("GET", path)
        answer = connection.getresponse().read()
        connection.close()
        return json.loads(answer)

    def send(self, number: int) -> None:
        """Send a signal to the process that was started."""
        self.process.send_signal(number)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it; gives the exit code."""
        self.process.send_signal(number)
        return self.process.wait(START_SECONDS)


@contextlib.contextmanager
def running(*arguments: Any) -> Iterator[ServerProcess]:
    """A server that does not outlive the test."""
    server = ServerProcess(*map(str, arguments))
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait()
        server.process.stderr.close()
