"""Runs texts of any number through a model: in the order of their lengths, several at once, while
the next ones are tokenized; answers come in the order of the texts.

A window of texts is sorted, so that what runs together is about equally long, and is cut into
groups by their blocks of tokens. Three windows are alive at a time, however many texts there are.
Of what comes one by one the first windows are small, so that the first answers come early.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple

from bertile.loader import Model
from bertile.text import batches
from bertile.text.batches import Outputs

WINDOW = 512  # texts that are sorted together
FIRST_WINDOW = 32  # of texts that are no list; each has twice as many as the one before
# Fewer blocks of tokens than these for each thread are run at once by all threads.
FEW_BLOCKS = 8


class Answer(NamedTuple):
    """What the model says of a text: its tokens, and each output, (length, …) where by token."""

    encoding: Any
    outputs: Outputs


class Engine:
    """Runs texts on `model` alone, or beside each other on `streams` of one thread each."""

    def __init__(self, model: Model, streams: int | None = None) -> None:
        self.model = model
        self._streams = streams
        self._side_by_side: Model | None = None
        self._lock = threading.Lock()
        self._masked = "attention_mask" in model.inputs
        self._by_token = {
            spec["name"] for spec in model.manifest["outputs"] if "length" in spec["axes"][1:2]
        }

    def single(self, encoding: Any) -> Answer:
        """The answer to one text, by all threads."""
        return self._run([encoding], self.model)[0]

    def run(self, encodings: Sequence[Any]) -> list[Answer]:
        """The answers to a few texts, by a stream; as many callers as there are `places` get theirs
        at once. Texts run together, those of a model without a mask if they are equally long.
        """
        model = self._beside()
        if self._masked:
            return self._run(encodings, model)
        outputs = batches.run_all(model, encodings)
        return [self._cut(*pair) for pair in zip(encodings, outputs)]

    @property
    def places(self) -> int:
        """How many calls run beside each other."""
        return self._streams or getattr(self.model, "threads", 1)

    def stream(
        self, texts: Iterable[Any], encode: Callable[[list[Any]], list[Any]]
    ) -> Iterator[Answer]:
        """The answers in the order of `texts`, which may be endless; `encode` tokenizes a list.

        Texts are taken in the caller's thread, a window ahead of the answers. What taking or
        tokenizing them raises is raised after the answers to the windows before.
        """
        source = _Source(texts, encode)
        encodings = source.encoded(source.window())
        if source.ended and self._are_few(encodings):
            outputs = batches.run_all(self.model, encodings)
            yield from (self._cut(*pair) for pair in zip(encodings, outputs))
            source.check()
            return
        model = self._beside()
        waiting: deque[list[tuple[Future, int]]] = deque()
        with ThreadPoolExecutor(1, "bertile-tokenize") as tokenizing:
            with ThreadPoolExecutor(self.places, "bertile-run") as running:
                try:
                    while encodings:
                        waiting.append(self._submitted(encodings, model, running))
                        window = source.window()
                        ahead = tokenizing.submit(source.encoded, window) if window else None
                        if len(waiting) > 1:
                            yield from _in_order(waiting.popleft())
                        encodings = ahead.result() if ahead else []
                    while waiting:
                        yield from _in_order(waiting.popleft())
                finally:  # whoever stops in the middle does not wait for what is queued
                    waiting.clear()
                    running.shutdown(wait=False, cancel_futures=True)
                    tokenizing.shutdown(wait=False, cancel_futures=True)
        source.check()

    def close(self) -> None:
        """Give back the threads and buffers; the model is its owner's to close."""
        if self._side_by_side is not None and self._side_by_side is not self.model:
            self._side_by_side.close()
        self._side_by_side = None

    def _beside(self) -> Model:
        """What lists run on: the same library and weights, several calls at once."""
        with self._lock:
            if self._side_by_side is None:
                several = self.places > 1 and hasattr(self.model, "beside")
                self._side_by_side = self.model.beside(self.places) if several else self.model
            return self._side_by_side

    def _are_few(self, encodings: Sequence[Any]) -> bool:
        total = sum(batches.blocks(encoding) for encoding in encodings)
        return self.places == 1 or total <= FEW_BLOCKS * self.places

    def _submitted(
        self, encodings: Sequence[Any], model: Model, running: ThreadPoolExecutor
    ) -> list[tuple[Future, int]]:
        """Of each text the call that it is part of, and its row there."""
        places: dict[int, tuple[Future, int]] = {}
        most = batches.call_blocks(encodings, self.places)
        for group in batches.groups(encodings, most, self._masked):
            call = running.submit(self._run, [encodings[index] for index in group], model)
            places.update({index: (call, row) for row, index in enumerate(group)})
        return [places[index] for index in range(len(encodings))]

    def _run(self, encodings: Sequence[Any], model: Model) -> list[Answer]:
        return [self._cut(*pair) for pair in zip(encodings, batches.run(model, encodings))]

    def _cut(self, encoding: Any, outputs: Outputs) -> Answer:
        """The answer to a text without what stands behind its last token."""
        own = {
            name: array[: len(encoding)] if name in self._by_token else array
            for name, array in outputs.items()
        }
        return Answer(encoding, own)


class _Source:
    """Takes texts by windows and tokenizes them, and keeps the error that ends them for `check`."""

    def __init__(self, texts: Iterable[Any], encode: Callable[[list[Any]], list[Any]]) -> None:
        self._texts, self._encode = iter(texts), encode
        self._size = WINDOW if isinstance(texts, Sequence) else min(FIRST_WINDOW, WINDOW)
        self._error: Exception | None = None
        self.ended = False

    def window(self) -> list[Any]:
        """The next texts; fewer than a window, or none, are the last."""
        texts: list[Any] = []
        if not self.ended:
            try:
                texts.extend(islice(self._texts, self._size))
            except Exception as error:  # of whoever made the iterable: any
                self._error = error
        self.ended = len(texts) < self._size
        self._size = min(2 * self._size, WINDOW)
        return texts

    def encoded(self, window: list[Any]) -> list[Any]:
        """A window's encodings; none where that fails."""
        try:
            return self._encode(window)
        except Exception as error:
            self._error, self.ended = error, True
            return []

    def check(self) -> None:
        """Raise what ended the texts, if that was an error."""
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:  # an error holds this frame, and with it all that its callers hold
            del error


def _in_order(places: list[tuple[Future, int]]) -> Iterator[Answer]:
    """The answers of a window, each as soon as those before it are there."""
    places.reverse()
    try:
        while places:  # which lets go of what was answered
            call, row = places.pop()
            yield call.result()[row]
    finally:  # a call's error holds this frame
        places.clear()
        call = None
