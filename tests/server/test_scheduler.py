"""Texts of many requests become calls: by turns, within the budget, and no failure spreads."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="the server needs the extra serve")
from helpers.server_engines import LONG_WAIT, STEPS, Noting, prepare, settled, submit

from bertile.errors import InputError
from bertile.server import errors
from bertile.server.scheduler import LONG_CHARACTERS, Scheduler
from bertile.text.text_model import Steps

BUDGET = 256  # tokens, 16 blocks


def run(engine: Noting, test: Callable[[Scheduler], Awaitable[Any]], tokens: int = BUDGET) -> Any:
    """What a test gives that is told a scheduler of this engine."""

    async def main() -> Any:
        scheduler = Scheduler(engine, tokens)
        scheduler.start()
        try:
            return await asyncio.wait_for(test(scheduler), LONG_WAIT)
        finally:
            engine.release()
            await asyncio.wait_for(scheduler.close(), LONG_WAIT)

    return asyncio.run(main())


async def waiting(scheduler: Scheduler, texts: int) -> None:
    """Wait until so many texts are tokenized and wait for a stream."""
    while scheduler.queue_size < texts:
        await asyncio.sleep(0.001)


def test_answers_are_those_of_the_texts_in_their_order() -> None:
    async def test(scheduler: Scheduler) -> None:
        works = [submit(scheduler, *range(first, first + 20)) for first in range(1, 100, 7)]
        await settled(*works)
        for first, work in zip(range(1, 100, 7), works):
            assert work.results == list(range(first, first + 20))
            assert work.refusal is None and work.tokens == sum(range(first, first + 20))
        assert scheduler.under_way == scheduler.queue_size == 0

    for places in (1, 2, 3):
        run(Noting(places), test)


def test_longer_text_in_an_empty_house_has_all_threads() -> None:
    engine = Noting(places=2)

    async def test(scheduler: Scheduler) -> None:
        await settled(submit(scheduler, 16))
        assert engine.alone == []
        engine.hold()
        works = [submit(scheduler, 50)]
        await engine.begun(2)
        works.append(submit(scheduler, 60))  # the house is not empty
        await engine.begun(3)
        engine.release()
        await settled(*works)
        assert engine.alone == [50]

    run(engine, test)


def test_free_stream_takes_at_once_what_is_there() -> None:
    engine = Noting()

    async def test(scheduler: Scheduler) -> None:
        engine.hold()
        first = submit(scheduler, 5)
        await engine.begun(1)  # nobody waited for more
        rest = [submit(scheduler, 5) for _ in range(6)]
        await waiting(scheduler, 6)
        engine.release()
        await settled(first, *rest)
        assert engine.calls == [[5], [5] * 6]

    run(engine, test)


def test_calls_have_no_more_than_the_budget_except_a_text_that_is_longer() -> None:
    engine = Noting()

    async def test(scheduler: Scheduler) -> None:
        engine.hold()
        works = [submit(scheduler, 1)]
        await engine.begun(1)
        works += [submit(scheduler, *([33] * 10)) for _ in range(5)]  # of 3 blocks each
        works.append(submit(scheduler, 900))
        await waiting(scheduler, 51)
        engine.release()
        await settled(*works)
        for call in engine.calls[1:]:
            assert sum(-(-length // 16) for length in call) <= BUDGET // 16 or call == [900]
        assert [900] in engine.calls

    run(engine, test)


def test_work_is_shared_out_among_free_streams() -> None:
    engine = Noting(places=2)

    async def test(scheduler: Scheduler) -> None:
        engine.hold()
        work = submit(scheduler, *([16] * 20))
        await engine.begun(2)
        engine.release()
        await settled(work)
        assert sorted(map(len, engine.calls)) == [10, 10]

    run(engine, test, tokens=10_000)


def test_short_requests_are_not_behind_a_long_list() -> None:
    engine = Noting()

    async def test(scheduler: Scheduler) -> None:
        engine.hold()
        works = [submit(scheduler, 1)]
        await engine.begun(1)
        works.append(submit(scheduler, *([100] * 50)))
        await waiting(scheduler, 50)
        works += [submit(scheduler, 10 + number) for number in range(4)]
        await waiting(scheduler, 54)
        engine.release()
        await settled(*works)
        behind = [number for number, call in enumerate(engine.calls) if {10, 11, 12, 13} & {*call}]
        assert max(behind) <= 2  # of some thirty

    run(engine, test)


def test_short_requests_are_not_behind_the_tokens_of_a_long_one() -> None:
    engine = Noting()
    tokenized = asyncio.Event()

    async def test(scheduler: Scheduler) -> None:
        loop = asyncio.get_running_loop()

        def slowly(texts: Any, first: int = 1) -> list[list[int]]:
            asyncio.run_coroutine_threadsafe(tokenized.wait(), loop).result(LONG_WAIT)
            return [[0] * 7 for _ in texts]

        done = loop.create_future()
        long = scheduler_work("7" * (LONG_CHARACTERS + 1), Steps(slowly, STEPS.finish), done)
        scheduler.submit(long)
        await settled(submit(scheduler, 5))
        assert not long.done.done()
        tokenized.set()
        await settled(long)
        assert long.results == [7]

    run(engine, test)


def scheduler_work(text: str, steps: Steps, done: Any) -> Any:
    from bertile.server.scheduler import Work

    return Work([text], steps, done)


def test_dropped_and_expired_works_do_not_run() -> None:
    engine = Noting()

    async def test(scheduler: Scheduler) -> None:
        engine.hold()
        works = [submit(scheduler, 1)]
        await engine.begun(1)
        dropped = submit(scheduler, 21, 22)
        expired = submit(scheduler, 23, deadline=time.monotonic() + 0.01)
        works.append(submit(scheduler, 24))
        await waiting(scheduler, 4)
        dropped.dropped = True
        dropped.done.cancel()
        await asyncio.sleep(0.02)
        engine.release()
        await settled(*works, expired)
        assert engine.calls == [[1], [24]]
        assert expired.refusal.kind is errors.EXPIRED
        await scheduler.drain()
        assert scheduler.under_way == 0

    run(engine, test)


def test_failure_is_that_of_the_request_which_causes_it() -> None:
    engine = Noting()
    engine.failing = lambda lengths: ValueError("13 is unlucky") if 13 in lengths else None

    async def test(scheduler: Scheduler) -> None:
        engine.hold()
        works = [submit(scheduler, 1)]
        await engine.begun(1)
        works += [submit(scheduler, 5, 6), submit(scheduler, 13, 7), submit(scheduler, 8)]
        await waiting(scheduler, 5)
        engine.release()
        await settled(*works)
        assert [work.results for work in works if work.refusal is None] == [[1], [5, 6], [8]]
        refusal = works[2].refusal
        assert refusal.kind is errors.BACKEND and refusal.kind.status == 424
        assert refusal.message == "Backend error: ValueError: 13 is unlucky"
        await settled(again := submit(scheduler, 9))  # it stays up
        assert again.results == [9]

    run(engine, test)


@pytest.mark.parametrize(
    ("error", "kind"),
    [(InputError("too long"), errors.INVALID), (Exception("no such byte"), errors.TOKENIZER)],
)
def test_text_that_becomes_no_tokens_is_refused(error: Exception, kind: Any) -> None:
    def failing(texts: Any, first: int = 1) -> Any:
        raise error

    async def test(scheduler: Scheduler) -> None:
        work = submit(scheduler, 3, steps=Steps(failing, STEPS.finish))
        await settled(work)
        assert work.refusal.kind is kind and kind.status == 422
        assert str(error) in work.refusal.message

    run(Noting(), test)


def test_error_behind_the_model_is_that_of_its_request() -> None:
    async def test(scheduler: Scheduler) -> None:
        bad = submit(scheduler, 3, steps=Steps(prepare, lambda answer: 1 // 0))
        good = submit(scheduler, 4)
        await settled(bad, good)
        assert bad.refusal.kind is errors.BACKEND and good.results == [4]

    run(Noting(), test)


def test_close_answers_what_is_in_the_house() -> None:
    engine = Noting()

    async def test(scheduler: Scheduler) -> None:
        engine.hold()
        works = [submit(scheduler, number) for number in range(1, 30)]
        await engine.begun(1)
        closing = asyncio.create_task(scheduler.close())
        await asyncio.sleep(0.01)
        assert not closing.done()
        engine.release()
        await closing
        assert [work.results for work in works] == [[number] for number in range(1, 30)]

    run(engine, test)


def test_wait_is_told_by_the_rate() -> None:
    engine = Noting()

    async def test(scheduler: Scheduler) -> None:
        assert scheduler.wait_seconds() == 0
        scheduler.blocks_a_second = 10.0
        engine.hold()
        works = [submit(scheduler, 1)]
        await engine.begun(1)
        works.append(submit(scheduler, *([16] * 30)))
        await waiting(scheduler, 30)
        assert scheduler.wait_seconds() == pytest.approx(3.0)
        engine.release()
        await settled(*works)

    run(engine, test)
