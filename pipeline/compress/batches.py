"""Chooses the examples of each step, so that any step can be told without those before it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache

ROOM = 16  # batches whose texts are sorted by length together: padding is computed too


class Batches:
    """Batches of exactly `size` examples, by the places of those in a list.

    Every pass over the examples has another order, by `seed`; what fills no batch is left out of a
    pass. Fewer examples than a batch are repeated. `lengths` are about how long each text is.
    """

    def __init__(self, lengths: Sequence[int], size: int, seed: int) -> None:
        times = -(-size // len(lengths))
        self.places = list(range(len(lengths))) * times
        self.lengths, self.size, self.seed = lengths, size, seed
        self.in_pass = len(self.places) // size
        self._pass = lru_cache(maxsize=2)(self._ordered)

    def at(self, step: int) -> list[int]:
        """The places of the examples of a step."""
        number, place = divmod(step, self.in_pass)
        return self._pass(number)[place]

    def _ordered(self, number: int) -> list[list[int]]:
        chance = random.Random(f"{self.seed}/{number}")
        order = list(self.places)
        chance.shuffle(order)
        room, groups = self.size * ROOM, []
        for start in range(0, len(order), room):
            near = sorted(order[start : start + room], key=lambda place: self.lengths[place])
            whole = len(near) // self.size * self.size
            # those that are left over are of any length, not always the longest
            spare = set(chance.sample(range(len(near)), len(near) - whole))
            near = [place for index, place in enumerate(near) if index not in spare]
            groups += [near[first : first + self.size] for first in range(0, whole, self.size)]
        chance.shuffle(groups)
        return groups[: self.in_pass]
