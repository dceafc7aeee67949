"""Calls an opened engine with texts, in the process that it lives in, and measures that."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bertile.loading.tvm_abi import Runtime

WARM_UP_TEXTS, WARM_UP_QUERIES = 64, 5
NOUNS = ("river", "engine", "letter", "garden", "number", "window", "signal")


class Pass(NamedTuple):
    """What came of a list of n texts: its vectors (n, d) float32, the seconds that it took, and of
    Bertile the share of its threads' time in which the model did not run.
    """

    vectors: np.ndarray
    seconds: float
    beside: float | None


def whole_list(encode: Any, texts: list[str]) -> Pass:
    """All texts at once, behind a warm-up on some of them."""
    encode(texts[:WARM_UP_TEXTS])
    with _model_seconds() as seconds:
        began = time.perf_counter()
        vectors = encode(texts)
        took = time.perf_counter() - began
    share = 1 - sum(seconds.values()) / (took * len(seconds)) if seconds else None
    return Pass(np.asarray(vectors, np.float32), took, share)


def single_queries(encode: Any, queries: list[str]) -> list[float]:
    """Milliseconds of each query by itself."""
    for query in queries[:WARM_UP_QUERIES]:
        encode(query)
    times = []
    for query in queries:
        began = time.perf_counter()
        encode(query)
        times.append((time.perf_counter() - began) * 1e3)
    return times


def each_alone(encode: Any, texts: list[str]) -> np.ndarray:
    """The vectors (n, d) of texts, each from a call of its own."""
    return np.stack([np.asarray(encode(text), np.float32) for text in texts])


@contextlib.contextmanager
def _model_seconds() -> Iterator[dict[int, float]]:
    """The seconds that each thread is within compiled libraries meanwhile: a stream has its own."""
    call, seconds = Runtime.call_packed, defaultdict(float)

    def timed(self: Runtime, *arguments: Any) -> Any:
        began = time.perf_counter()
        try:
            return call(self, *arguments)
        finally:
            seconds[threading.get_ident()] += time.perf_counter() - began

    Runtime.call_packed = timed  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        Runtime.call_packed = call  # type: ignore[method-assign]


def short_texts(count: int) -> Iterator[str]:
    """So many texts of a few words each, of which no two are alike."""
    for number in range(count):
        first, second = NOUNS[number % 7], NOUNS[number // 7 % 7]
        yield f"the {first} of {second} {number}" + " again" * (number % 5)


def resident_mb(model: Any, texts: Iterable[str], marks: Sequence[int]) -> list[float]:
    """What this process holds when so many vectors have come through `encode_iter`, in 10**6 bytes.

    The vectors themselves are let go of.
    """
    held, left = [], list(marks)
    for done, _ in enumerate(model.encode_iter(texts), 1):
        if left and done == left[0]:
            held.append(_resident())
            left.pop(0)
    return held


def _resident() -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024 / 1e6
