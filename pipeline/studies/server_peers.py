"""Serves another engine as a plain FastAPI app would, with requests that wait run together."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from bertile.base.errors import require
from bertile.bench.engines import Engine
from bertile.studies import text_peers

KINDS = ("onnxruntime", "openvino")


def serve(engine: Engine, threads: int, port: int, budget: int) -> None:
    """Answer POST /embed {"inputs": text} on this port, with the vector in a list, until killed.

    What waits runs together, at most `budget` tokens at a time, padding among them.
    """
    (uvicorn,) = require("serve", "uvicorn")
    tokenizer, vectors, _ = text_peers.session(engine, threads)
    application = app(tokenizer, vectors, budget)
    uvicorn.run(
        application,
        host="127.0.0.1",
        port=port,
        log_level="warning",
        loop="uvloop",
        http="httptools",
    )


def app(tokenizer: Any, vectors: Callable[[Sequence[Any]], np.ndarray], budget: int) -> Any:
    """The FastAPI application around an engine: see `text_peers.session`."""
    fastapi, orjson, pydantic = require("bench", "fastapi", "orjson", "pydantic")
    waiting = Waiting(functools.partial(_run, tokenizer, vectors, budget))
    Ask = pydantic.create_model("Ask", inputs=(str, ...))

    async def embed(asked: Ask) -> Any:  # type: ignore[valid-type]
        vector = await waiting.answer(asked.inputs)
        content = orjson.dumps([vector], option=orjson.OPT_SERIALIZE_NUMPY)
        return fastapi.Response(content, media_type="application/json")

    async def health() -> dict[str, str]:
        return {}

    embed.__annotations__["asked"] = Ask  # the words of this file's annotations are strings
    application = fastapi.FastAPI()
    application.post("/embed")(embed)
    application.get("/health")(health)
    return application


class Waiting:
    """Texts that wait for a thread, which takes all of them at once as soon as it is free.

    `run` gives the places of some texts with their answers, group by group.
    """

    def __init__(self, run: Callable[[list[str]], Iterator[tuple[list[int], Any]]]) -> None:
        self._run, self._thread = run, ThreadPoolExecutor(1)
        self._texts: list[tuple[str, asyncio.Future]] = []
        self._task: asyncio.Task | None = None

    async def answer(self, text: str) -> Any:
        """The answer to a text."""
        future = asyncio.get_running_loop().create_future()
        self._texts.append((text, future))
        if self._task is None:
            self._task = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._texts:
            texts, self._texts = self._texts, []
            await loop.run_in_executor(self._thread, self._answer_all, loop, texts)
        self._task = None

    def _answer_all(
        self, loop: asyncio.AbstractEventLoop, texts: list[tuple[str, asyncio.Future]]
    ) -> None:
        futures = [future for _, future in texts]
        for places, answers in self._run([text for text, _ in texts]):
            group = [futures[place] for place in places]
            loop.call_soon_threadsafe(_set_all, group, answers)


def _set_all(futures: Sequence[asyncio.Future], answers: Sequence[Any]) -> None:
    for future, answer in zip(futures, answers):
        if not future.done():  # its client may have left
            future.set_result(answer)


def _run(
    tokenizer: Any, vectors: Callable[[Sequence[Any]], np.ndarray], budget: int, texts: list[str]
) -> Iterator[tuple[list[int], np.ndarray]]:
    encodings = tokenizer.encode_batch(texts)
    for group in groups([len(encoding) for encoding in encodings], budget):
        yield group, vectors([encodings[place] for place in group])


def groups(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """The places of texts of these lengths, the shortest first, in groups of at most `budget`
    tokens when each is padded to the group's longest; at least one text each.
    """
    group: list[int] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        if group and (len(group) + 1) * lengths[place] > budget:
            yield group
            group = []
        group.append(place)
    if group:
        yield group
