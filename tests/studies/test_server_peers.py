"""Plain servers of other engines: what waits runs together within a budget, each has its answer."""

from __future__ import annotations

import asyncio

import pytest

from bertile.studies import server_peers


@pytest.mark.parametrize(
    "lengths, budget, groups",
    [
        ([], 10, []),
        ([30], 10, [[0]]),
        ([3, 9, 3], 10, [[0, 2], [1]]),
        ([5, 5, 5, 5], 10, [[0, 1], [2, 3]]),
        ([1, 2, 3, 4], 12, [[0, 1, 2], [3]]),
    ],
)
def test_groups_stay_within_the_budget_with_their_padding(lengths, budget, groups) -> None:
    assert list(server_peers.groups(lengths, budget)) == groups


def test_what_waits_runs_together_and_each_has_its_own_answer() -> None:
    runs = []

    def run(texts: list[str]):
        runs.append(texts)
        for place in reversed(range(len(texts))):
            yield [place], [texts[place].upper()]

    async def ask() -> list[str]:
        waiting = server_peers.Waiting(run)
        answers = await asyncio.gather(*map(waiting.answer, "abc"))
        return [*answers, await waiting.answer("d")]

    assert asyncio.run(ask()) == ["A", "B", "C", "D"]
    assert runs == [["a", "b", "c"], ["d"]]
