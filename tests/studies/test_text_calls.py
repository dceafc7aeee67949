"""What is measured in an engine's process: all texts, each query, the share beside the model."""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest

from bertile.loading.tvm_abi import Runtime
from bertile.studies import text_calls


class Asked:
    """An engine that says what it was asked; a text takes it a millisecond."""

    def __init__(self) -> None:
        self.lists: list = []

    def encode(self, texts):
        self.lists.append(texts)
        time.sleep(1e-3)
        return np.ones(2) if isinstance(texts, str) else np.ones((len(texts), 2))


def test_a_list_is_timed_behind_its_warm_up() -> None:
    asked = Asked()
    texts = [str(number) for number in range(100)]
    outcome = text_calls.whole_list(asked.encode, texts)
    assert asked.lists == [texts[: text_calls.WARM_UP_TEXTS], texts]
    assert outcome.vectors.shape == (100, 2) and outcome.vectors.dtype == np.float32
    assert 1e-3 <= outcome.seconds < 1 and outcome.beside is None


def test_share_beside_the_model_counts_what_its_calls_leave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def call(self, function, seconds):
        time.sleep(seconds)

    monkeypatch.setattr(Runtime, "call_packed", call)
    runtime = Runtime.__new__(Runtime)

    def encode(texts):
        runtime.call_packed("main", 0.06)
        time.sleep(0.02)
        return np.ones((len(texts), 2))

    outcome = text_calls.whole_list(encode, ["a"])
    assert 0.1 < outcome.beside < 0.5
    assert Runtime.call_packed is call


def test_each_query_is_a_call_of_its_own() -> None:
    asked = Asked()
    queries = [str(number) for number in range(8)]
    times = text_calls.single_queries(asked.encode, queries)
    assert asked.lists == [*queries[: text_calls.WARM_UP_QUERIES], *queries]
    assert len(times) == 8 and all(1 <= milliseconds < 500 for milliseconds in times)


def test_short_texts_are_many_and_different() -> None:
    texts = list(text_calls.short_texts(1000))
    assert len(set(texts)) == 1000 and max(len(text.split()) for text in texts) <= 10


def test_resident_memory_is_read_at_its_marks() -> None:
    read: list[int] = []

    def texts():
        for number in range(10):
            read.append(number)
            yield str(number)

    model = SimpleNamespace(encode_iter=lambda texts: (np.ones(2) for _ in texts))
    held = text_calls.resident_mb(model, texts(), (1, 5, 10))
    assert len(held) == 3 and all(megabytes > 1 for megabytes in held) and len(read) == 10
