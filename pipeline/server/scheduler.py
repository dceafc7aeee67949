"""Merges the texts of many requests into calls of one model, as fast as its streams are free.

    submit ─▶ tokenized by a thread, long texts by another ─▶ waiting, request by request
           ─▶ a group for each free stream ─▶ answers ─▶ `deliver`, in the event loop

Nobody waits for a group to fill: a free stream takes what is there. Requests take turns, a few
blocks of tokens each, so that a short one is not stuck behind a list or a long document. What runs
together need not be equally long, since blocks of padding are not computed.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Any, Protocol

from bertile.loading.blocks import BLOCK_TOKENS
from bertile.server import errors
from bertile.server.errors import Refusal
from bertile.text import batches
from bertile.text.engine import Answer
from bertile.text.text_model import Steps

# A request of more characters is tokenized by the thread for long ones, some texts at a time.
LONG_CHARACTERS, PIECE_CHARACTERS = 16_384, 4_096
# What a request may put into a group when it is its turn, in blocks of tokens.
TURN_BLOCKS = 8
# All threads take from here on half to two thirds of the time of one (MiniLM in int8, two cores),
# for a text of a block seven eighths, and twice the processor's.
ALONE_BLOCKS = 2
# Fewer blocks are not shared out among streams: what a call costs beside the model is too much.
LEAST_BLOCKS = 8
# How much of an old rate is kept behind a group: so that it is that of the last fifty or so.
KEPT_RATE = 0.98


class Runs(Protocol):
    """What runs encodings: `bertile.text.engine.Engine`."""

    places: int

    def run(self, encodings: Sequence[Any]) -> list[Answer]:
        """The answers to texts that run together, in one of `places` streams."""
        ...

    def single(self, encoding: Any) -> Answer:
        """The answer to a text, by all threads."""
        ...


class Watch(Protocol):
    """What is told of groups and of lengths; `metrics.ModelMetrics`."""

    def group(self, lengths: Sequence[int], seconds: float) -> None:
        """Texts of so many tokens each ran together."""
        ...


class Work:
    """The texts of a request for one model, and what becomes of them.

    `steps` say how they become tokens, and what is made of answers. `done` is set in the event
    loop, when all of `results` are there, or `refusal`. Times are seconds, `deadline` a
    `time.monotonic()`.
    """

    __slots__ = (
        "characters",
        "deadline",
        "done",
        "dropped",
        "inference_seconds",
        "left",
        "queue_seconds",
        "refusal",
        "results",
        "steps",
        "submitted",
        "texts",
        "tokenized_seconds",
        "tokens",
        "waiting",
    )

    def __init__(
        self,
        texts: Sequence[Any],
        steps: Steps,
        done: asyncio.Future[None],
        deadline: float | None = None,
    ) -> None:
        self.texts, self.steps, self.done, self.deadline = texts, steps, done, deadline
        self.results: list[Any] = [None] * len(texts)
        self.left = len(texts)
        self.characters = sum(map(_characters, texts))
        self.refusal: Refusal | None = None
        self.dropped = False
        # texts that are tokenized and do not run yet: index, encoding, blocks, since when
        self.waiting: deque[tuple[int, Any, int, float]] = deque()
        self.tokens = 0
        self.submitted = False
        self.tokenized_seconds = self.queue_seconds = self.inference_seconds = 0.0

    def leave(self) -> None:
        """End it for a client that has gone away; in the event loop."""
        self._end(errors.CLIENT_GONE, "the client went away")

    def expire(self) -> None:
        """End it where its deadline is over; in the event loop."""
        self._end(errors.EXPIRED, "the deadline is over")

    def _end(self, kind: errors.Kind, message: str) -> None:
        if not self.done.done():
            self.refusal = Refusal(kind, message)
            self.done.set_result(None)

    def over(self, now: float) -> bool:
        """Whether nobody waits for it any more."""
        if self.dropped or self.refusal is not None:
            return True
        return self.deadline is not None and now > self.deadline


class Scheduler:
    """Runs the works of one model in threads of its own, from `start` to `close`.

    `most_tokens` is how many run together at most, except for a text that is longer by itself.
    """

    def __init__(self, engine: Runs, most_tokens: int, watch: Watch | None = None) -> None:
        self._engine, self._watch = engine, watch
        self.most_blocks = max(1, most_tokens // BLOCK_TOKENS)
        self.places = engine.places
        self._come: list[Work] = []  # in this turn of the event loop
        self._inbox: SimpleQueue[list[Work] | None] = SimpleQueue()
        self._long: SimpleQueue[list[Work] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._some = threading.Condition(self._lock)
        self._ready: deque[Work] = deque()  # with texts that wait, in the order of their turns
        self._waiting_blocks = self._waiting_texts = 0
        self._idle = 0  # runners that wait for work
        self._closing = False
        self._finished: deque[Work] = deque()
        self._told = False  # the loop is to look at what is finished
        self._loop: asyncio.AbstractEventLoop | None = None
        self._threads: list[threading.Thread] = []
        self._under_way = 0  # works, as the event loop counts them
        self._none_left: asyncio.Event | None = None
        self.blocks_a_second = 0.0  # of one stream, lately

    def start(self) -> None:
        """Start the threads; the running event loop is that which works are submitted from."""
        self._loop = asyncio.get_running_loop()
        self._none_left = asyncio.Event()
        self._none_left.set()
        places = [(self._tokenize, "tokenize", (self._inbox,))]
        places += [(self._tokenize, "tokenize-long", (self._long,))]
        places += [(self._run, f"run-{number}", ()) for number in range(self.places)]
        for target, name, arguments in places:
            thread = threading.Thread(target=target, args=arguments, name=f"bertile-{name}")
            thread.daemon = True  # a process that ends does not wait for a client's texts
            thread.start()
            self._threads.append(thread)

    def submit(self, work: Work) -> None:
        """Take a work; in the event loop. Its `done` is set when there are results or a refusal."""
        work.submitted = True
        self._under_way += 1
        self._none_left.clear()
        if work.characters > LONG_CHARACTERS:
            self._long.put([work])
            return
        if not self._come:  # those of one turn of the loop wake the thread once
            self._loop.call_soon(self._hand_over)
        self._come.append(work)

    def _hand_over(self) -> None:
        come, self._come = self._come, []
        self._inbox.put(come)

    @property
    def under_way(self) -> int:
        """How many works are in the house."""
        return self._under_way

    @property
    def queue_size(self) -> int:
        """How many texts are tokenized and wait for a stream."""
        return self._waiting_texts

    def wait_seconds(self) -> float:
        """How long what waits will take, by the rate of late."""
        if not self.blocks_a_second:
            return 0.0
        return self._waiting_blocks / (self.blocks_a_second * self.places)

    async def drain(self) -> None:
        """Wait until no work is in the house."""
        await self._none_left.wait()

    async def close(self) -> None:
        """End the threads, behind the works that they have."""
        await self.drain()
        self._inbox.put(None)
        self._long.put(None)
        with self._lock:
            self._closing = True
            self._some.notify_all()
        for thread in self._threads:
            await asyncio.to_thread(thread.join)
        self._threads.clear()

    # In the threads that tokenize.

    def _tokenize(self, inbox: SimpleQueue[list[Work] | None]) -> None:
        while (works := inbox.get()) is not None:
            for work in works:
                self._prepare(work)

    def _prepare(self, work: Work) -> None:
        first = 0
        while first < len(work.texts):
            began = time.monotonic()
            if work.over(began):
                self._finish([work])
                return
            end = _end_of_piece(work, first)
            try:
                encodings = work.steps.prepare(work.texts[first:end], first=first + 1)
            except Exception as error:  # of a tokenizer: any
                self._refuse(work, errors.of_preparing(error))
                return
            now = time.monotonic()
            work.tokenized_seconds += now - began
            entries = [
                (index, encoding, batches.blocks(encoding), now)
                for index, encoding in enumerate(encodings, first)
            ]
            self._enqueue(work, entries)
            first = end

    def _enqueue(self, work: Work, entries: list[tuple[int, Any, int, float]]) -> None:
        blocks = sum(entry[2] for entry in entries)
        tokens = sum(len(entry[1]) for entry in entries)
        with self._lock:
            work.tokens += tokens
            if not work.waiting:
                self._ready.append(work)
            work.waiting.extend(entries)
            self._waiting_blocks += blocks
            self._waiting_texts += len(entries)
            if self._idle:
                self._some.notify(max(1, min(self._idle, blocks // LEAST_BLOCKS)))

    # In the threads that run the model.

    def _run(self) -> None:
        while (group := self._take()) is not None:
            taken, alone = group
            if taken:
                self._answer(taken, alone)

    def _take(self) -> tuple[list[tuple[Work, int, Any, int]], bool] | None:
        """The next group, and whether nothing else is under way; None at the end."""
        with self._lock:
            self._idle += 1
            while not self._ready and not self._closing:
                self._some.wait()
            alone = self._idle == self.places
            share = -(-self._waiting_blocks // self._idle)
            self._idle -= 1
            if not self._ready:
                return None
            most = min(self.most_blocks, max(LEAST_BLOCKS, share))
            taken, over = self._group(most)
            if self._ready:
                alone = False
                if self._idle:
                    self._some.notify()
        if over:
            self._finish(over)
        return taken, alone

    def _group(self, most: int) -> tuple[list[tuple[Work, int, Any, int]], list[Work]]:
        """Texts of at most `most` blocks, by turns of their requests; and works that are over."""
        taken: list[tuple[Work, int, Any, int]] = []
        over: list[Work] = []
        ready, room, now = self._ready, most, time.monotonic()
        while ready and (room > 0 or not taken):
            work = ready.popleft()
            waiting = work.waiting
            if work.over(now):
                over.append(work)
                self._waiting_blocks -= sum(entry[2] for entry in waiting)
                self._waiting_texts -= len(waiting)
                waiting.clear()
                continue
            turn, full = 0, False
            while waiting:
                index, encoding, blocks, since = waiting[0]
                if turn and turn + blocks > TURN_BLOCKS:
                    break
                if taken and blocks > room:
                    full = True
                    break
                waiting.popleft()
                taken.append((work, index, encoding, blocks))
                work.queue_seconds += now - since
                turn += blocks
                room -= blocks
                self._waiting_blocks -= blocks
                self._waiting_texts -= 1
            if full:
                ready.appendleft(work)
                break
            if waiting:
                ready.append(work)
        return taken, over

    def _answer(self, taken: list[tuple[Work, int, Any, int]], alone: bool) -> None:
        began = time.monotonic()
        works, indices, encodings, blocks = zip(*taken)
        try:
            if alone and len(taken) == 1 and blocks[0] >= ALONE_BLOCKS:
                answers = [self._engine.single(encodings[0])]
            else:
                answers = self._engine.run(encodings)
        except Exception as error:  # of a model: any
            self._fail(taken, error)
            return
        now = time.monotonic()
        seconds = now - began
        self._measure(sum(blocks), seconds)
        if self._watch is not None:
            self._watch.group([len(encoding) for encoding in encodings], seconds)
        for work, index, answer in zip(works, indices, answers):
            try:
                work.results[index] = work.steps.finish(answer)
            except Exception as error:  # of what is made of an answer: any
                work.refusal = errors.of_running(error)
        finished = []
        with self._lock:  # others may run texts of the same works
            for work in works:
                work.inference_seconds += seconds
                work.left -= 1
                if work.left == 0 or work.refusal is not None:
                    finished.append(work)
        self._finish(finished)

    def _fail(self, taken: list[tuple[Work, int, Any, int]], error: Exception) -> None:
        """Refuse what the model fails on: of several requests, each runs by itself again."""
        works = list(dict.fromkeys(entry[0] for entry in taken))
        if len(works) == 1:
            self._refuse(works[0], errors.of_running(error))
            return
        for work in works:
            self._answer([entry for entry in taken if entry[0] is work], alone=False)

    def _measure(self, blocks: int, seconds: float) -> None:
        rate = blocks / max(seconds, 1e-9)
        old = self.blocks_a_second
        self.blocks_a_second = KEPT_RATE * old + (1 - KEPT_RATE) * rate if old else rate

    # On the way back to the event loop.

    def _refuse(self, work: Work, refusal: Refusal) -> None:
        work.refusal = refusal
        self._finish([work])

    def _finish(self, works: Sequence[Work]) -> None:
        if not works:
            return
        self._finished.extend(works)
        if not self._told:  # else the loop has still to look
            self._told = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._told = False  # before it looks: what comes from now on is told anew
        while self._finished:
            work = self._finished.popleft()
            if not work.done.done():
                if work.refusal is None and work.left:
                    work.expire()
                else:
                    work.done.set_result(None)
            if work.submitted:  # else a second thread has finished it too
                work.submitted = False
                self._under_way -= 1
                if not self._under_way:
                    self._none_left.set()


def _characters(text: Any) -> int:
    """How many characters a text or a pair has; a list of ids counts its ids, as TEI's does."""
    return len(text[0]) + len(text[1]) if isinstance(text, tuple) else len(text)


def _end_of_piece(work: Work, first: int) -> int:
    """Up to which text those from `first` are tokenized in one go: all of a short request."""
    if work.characters <= LONG_CHARACTERS:
        return len(work.texts)
    end, characters = first + 1, _characters(work.texts[first])
    while end < len(work.texts) and characters + _characters(work.texts[end]) <= PIECE_CHARACTERS:
        characters += _characters(work.texts[end])
        end += 1
    return end
