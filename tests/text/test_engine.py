"""Texts run in windows, side by side, in order; what stops them stops everything behind."""

from __future__ import annotations

import gc
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.text_models import Counting

from bertile.errors import InputError
from bertile.text import batches, engine
from bertile.text.embedder import Embedder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of eight texts, calls of two blocks: many of both from few texts."""
    monkeypatch.setattr(engine, "WINDOW", 8)
    monkeypatch.setattr(batches, "CALL_BLOCKS", 2)
    monkeypatch.setattr(engine, "FEW_BLOCKS", 0)


def counted(number: int) -> str:
    """A text of its own vector."""
    return " ".join(["a"] * (number % 7) + ["b"] * (number % 5))


def wanted(count: int) -> list[list[int]]:
    return [[number % 7, number % 5] for number in range(count)]


def threads_of_streams() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("bertile-")]


def test_few_texts_are_one_call_of_all_threads(words: Path) -> None:
    model = Counting()
    vectors = Embedder(model, words).encode(["a a a a a", "b", "a", "a b"])
    assert vectors.tolist() == [[5, 0], [0, 1], [1, 0], [1, 1]]
    assert model.shapes == [(4, 7)]


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 16, 17, 100])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_answers_come_in_order_whatever_the_number(small, words: Path, count, threads) -> None:
    model = Counting(threads)
    vectors = Embedder(model, words).encode([counted(number) for number in range(count)])
    assert vectors.tolist() == wanted(count)
    if threads > 1:  # else few texts are a call
        assert all(rows * -(-length // 16) <= 2 or rows == 1 for rows, length in model.shapes)


def test_windows_are_sorted_so_that_calls_have_little_padding(small, words: Path) -> None:
    model = Counting()
    long, short = " ".join(["a"] * 30), "b"
    Embedder(model, words).encode([long, short] * 4)
    assert sorted(model.shapes) == [(1, 32)] * 4 + [(2, 3)] * 2


def test_rows_of_a_model_without_a_mask_are_equally_long(small, words: Path) -> None:
    lengths: list[set[int]] = []

    class Unmasked(Counting):
        inputs = ("input_ids",)

        def __call__(self, input_ids: np.ndarray) -> dict[str, np.ndarray]:
            lengths.append(set((input_ids > 0).sum(1).tolist()))
            return super().__call__(input_ids, input_ids > 0)

    vectors = Embedder(Unmasked(), words).encode([counted(number) for number in range(20)])
    assert vectors.tolist() == wanted(20)
    assert lengths and all(len(row) == 1 for row in lengths)


@pytest.mark.parametrize("masked", [True, False])
def test_some_texts_run_in_a_stream(words: Path, masked: bool) -> None:
    lengths: list[set[int]] = []

    class Noting(Counting):
        inputs = ("input_ids", "attention_mask") if masked else ("input_ids",)

        def __call__(self, input_ids: np.ndarray, **_: Any) -> dict[str, np.ndarray]:
            lengths.append(set((input_ids > 0).sum(1).tolist()))
            return super().__call__(input_ids, input_ids > 0)

    embedder = Embedder(Noting(), words)
    steps = embedder.steps()
    texts = [counted(number) for number in range(20)]
    answers = embedder.engine.run(steps.prepare(texts))
    assert [steps.finish(answer).tolist() for answer in answers] == wanted(20)
    assert len(lengths) == 1 if masked else all(len(same) == 1 for same in lengths)


@pytest.mark.parametrize(("streams", "most"), [(None, 3), (1, 1), (2, 2)])
def test_as_many_calls_run_at_once_as_there_are_streams(small, words, streams, most) -> None:
    model = Counting(threads=3, seconds=0.02)
    Embedder(model, words, streams).encode([counted(number) for number in range(40)])
    assert model.most_running == most


def test_text_of_no_tokens_is_a_text(words: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(words / "tokenizer.json"))
    tokenizer.post_processor = tokenizers.processors.Sequence([])  # nothing around a text
    tokenizer.save(str(words / "tokenizer.json"))
    embedder = Embedder(Counting(), words)
    assert embedder.encode(["", "a", ""]).tolist() == [[0, 0], [1, 0], [0, 0]]
    assert embedder.encode("").tolist() == [0, 0]


def test_answers_before_an_error_of_the_texts_come_first(small, words: Path) -> None:
    def texts(count: int) -> Iterator[str]:
        yield from (counted(number) for number in range(count))
        raise OSError("the disk is gone")

    embedder = Embedder(Counting(), words)
    for count in (0, 3, 8, 21, 24):
        vectors = embedder.encode_iter(texts(count))
        got = []
        with pytest.raises(OSError, match="the disk is gone"):
            for vector in vectors:
                got.append(vector.tolist())
        assert got == wanted(count)
    assert not threads_of_streams()


def test_error_of_a_call_is_raised_and_nothing_more_is_run(small, words: Path) -> None:
    model = Counting(seconds=0.01)
    model.failing = InputError("the ids are wrong")
    with pytest.raises(InputError, match="the ids are wrong"):
        Embedder(model, words).encode([counted(number) for number in range(500)])
    assert len(model.shapes) < 30  # three windows of at most eight calls
    assert not threads_of_streams()


@pytest.mark.parametrize("of_a_call", [False, True])
def test_error_holds_nothing_of_those_who_caught_it(small, words: Path, of_a_call) -> None:
    """Errors refer to frames; one that its own frame refers to lives until the next collection."""
    model = Counting(max_length=8)
    if of_a_call:
        model.failing = InputError("the ids are wrong")

    class Local:
        """Something in a frame of the caller."""

    def ask() -> weakref.ref:
        local = Local()
        texts = ["a"] * 20 + ([] if of_a_call else ["a a a a a a a"])
        with pytest.raises(InputError):
            Embedder(model, words).encode(texts, truncate=False)
        return weakref.ref(local)

    gc.disable()
    try:
        reference = ask()
        model.failing = None
        assert reference() is None
    finally:
        gc.enable()


def test_closing_in_the_middle_runs_nothing_more(small, words: Path) -> None:
    model = Counting(seconds=0.01)
    read: list[int] = []

    def texts() -> Iterator[str]:
        for number in range(10_000):
            read.append(number)
            yield counted(number)

    vectors = Embedder(model, words).encode_iter(texts())
    assert [next(vectors).tolist() for _ in range(3)] == wanted(3)
    vectors.close()
    calls = len(model.shapes)
    assert len(read) <= 24 and calls <= 24
    assert not threads_of_streams()
    time.sleep(0.05)
    assert len(model.shapes) == calls


def test_ctrl_c_stops_a_stream_at_once(small, words: Path) -> None:
    model = Counting(seconds=0.02)
    main = threading.main_thread().ident
    if threading.get_ident() != main:
        pytest.skip("signals reach the main thread alone")
    timer = threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            Embedder(model, words).encode([counted(number) for number in range(20_000)])
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)
    calls = len(model.shapes)
    assert calls < 500
    assert not threads_of_streams()
    time.sleep(0.05)
    assert len(model.shapes) == calls
    assert Embedder(Counting(), words).encode("a").tolist() == [1, 0]


def test_what_is_alive_does_not_grow_with_the_number_of_texts(small, words: Path) -> None:
    class Text(str):
        """A text that can be referred to weakly."""

    read: list[weakref.ref] = []
    rows: list[weakref.ref] = []

    def alive(references: list[weakref.ref]) -> int:
        return sum(reference() is not None for reference in references)

    class Watched(Counting):
        def __call__(self, **arrays: np.ndarray) -> dict[str, np.ndarray]:
            outputs = super().__call__(**arrays)
            rows.append(weakref.ref(outputs["sentence_embedding"]))
            return outputs

    def texts() -> Iterator[str]:
        for number in range(400):
            text = Text(counted(number))
            read.append(weakref.ref(text))
            yield text

    most_texts = most_rows = 0
    for vector in Embedder(Watched(), words).encode_iter(texts()):
        most_texts, most_rows = max(most_texts, alive(read)), max(most_rows, alive(rows))
        del vector
    assert (len(read), len(rows)) == (400, 200)
    assert 0 < most_texts <= 3 * 8
    assert 0 < most_rows <= 3 * 8


def test_first_answers_of_an_endless_stream_come_early(words: Path) -> None:
    read = 0

    def texts() -> Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield counted(read - 1)

    vectors = Embedder(Counting(2), words).encode_iter(texts())
    assert next(vectors).tolist() == wanted(1)[0]
    assert read == (1 + 2 + 4) * engine.FIRST_WINDOW < engine.WINDOW  # three windows
    vectors.close()
