"""Finds a place in memory for all that one shape needs, and an order for its launches."""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bertile.loading.errors import AGAIN, BundleError

ALIGNMENT = 256  # bytes, of everything in an arena


class Step(NamedTuple):
    """One launch; extents are numbers in the plan's list of extents."""

    entry: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    when: int | None
    arguments: tuple[tuple[str, int | float], ...]

    def numbers(self, kind: str) -> list[int]:
        """The buffers or inputs that are among the arguments."""
        return [number for role, number in self.arguments if role == kind]


class Contents(NamedTuple):
    """What a plan keeps in memory; sizes are numbers in its list of extents."""

    inputs: list[tuple[np.dtype, tuple[int, ...]]]
    outputs: list[tuple[np.dtype, tuple[int, ...], int]]  # with the buffer that each is
    buffers: list[int]


class Array(NamedTuple):
    """An input or output of one shape, and where it lies in an arena."""

    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


class Layout:
    """Where everything lies in an arena for one shape, and its launches with what they wait for.

    The arena is [outputs | inputs | other buffers], so that one copy brings the outputs down and
    one the inputs up. `after` has for each step the earlier steps that it waits for. Places are
    those of a larger layout of the same steps where everything fits there.
    """

    def __init__(
        self,
        contents: Contents,
        values: tuple[int, ...],
        steps: list[Step],
        larger: Layout | None = None,
    ):
        self.values, self.steps = values, steps
        arrays = [self._array(*entry[:2]) for entry in (*contents.outputs, *contents.inputs)]
        end = 0
        for index, array in enumerate(arrays):
            arrays[index] = array._replace(offset=end)
            end += aligned_size(array.bytes)
        count = len(contents.outputs)
        self.outputs, self.inputs = arrays[:count], arrays[count:]
        self.output_bytes = self.inputs[0].offset
        self.input_bytes = end - self.output_bytes
        self.sizes = [values[extent] for extent in contents.buffers]
        if min(self.sizes, default=0) < 0:
            raise BundleError("the plan has a buffer of negative size", AGAIN)
        fixed = {}
        for array, (_, _, buffer) in zip(self.outputs, contents.outputs):
            if self.sizes[buffer] > aligned_size(array.bytes):
                raise BundleError(f"the plan's buffer {buffer} is larger than its output", AGAIN)
            fixed[buffer] = array.offset
        self.output_buffers = {buffer: index for index, buffer in enumerate(fixed)}
        if larger is not None and self._fits(larger, end):
            self.buffers, self.bytes, self.after = larger.buffers, larger.bytes, larger.after
        else:
            self._arrange(fixed, end)

    def _fits(self, larger: Layout, end: int) -> bool:
        return (
            self.output_bytes == larger.output_bytes
            and end <= larger.output_bytes + larger.input_bytes
            and all(size <= room for size, room in zip(self.sizes, larger.sizes))
        )

    def _arrange(self, fixed: dict[int, int], end: int) -> None:
        """Find places for all buffers beside the outputs, behind `end`."""
        lives = self._lives(fixed)
        offsets, size = place_buffers(
            [self.sizes[buffer] for buffer in lives], list(lives.values())
        )
        self.buffers = {**fixed, **{buffer: end + offset for buffer, offset in zip(lives, offsets)}}
        self.bytes = end + size
        spans = {
            buffer: (begin, begin + max(1, self.sizes[buffer]))
            for buffer, begin in self.buffers.items()
        }
        self.after = order([step.numbers("buffer") for step in self.steps], spans)

    def _array(self, dtype: np.dtype, shape: tuple[int, ...]) -> Array:
        sizes = tuple(self.values[extent] for extent in shape)
        if min(sizes, default=1) < 1:
            raise BundleError(f"the plan has an input or output of shape {sizes}", AGAIN)
        return Array(0, dtype, sizes)

    def _lives(self, fixed: Iterable[int]) -> dict[int, tuple[int, int]]:
        """For each buffer beside the outputs, the first and the last step that use it."""
        lives: dict[int, tuple[int, int]] = {}
        for number, step in enumerate(self.steps):
            for buffer in step.numbers("buffer"):
                if buffer not in fixed:
                    lives[buffer] = (lives.get(buffer, (number, 0))[0], number)
        return lives


def aligned_size(size: int) -> int:
    """Return a size in bytes rounded up to a multiple of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def place_buffers(sizes: Sequence[int], lives: Sequence[tuple[int, int]]) -> tuple[list[int], int]:
    """Return offsets for buffers of so many bytes, live from a first to a last step, and the end.

    Greedy: the largest first, each into the smallest gap that takes it among those that it shares
    a step with (Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net Inference").
    """
    offsets, end = [0] * len(sizes), 0
    placed: list[tuple[int, int, int, int]] = []  # offset, end, first step, last step
    for index in sorted(range(len(sizes)), key=lambda buffer: -sizes[buffer]):
        first, last = lives[index]
        need, best, room, at = max(ALIGNMENT, aligned_size(sizes[index])), None, None, 0
        for begin, until, since, to in placed:  # by their offsets
            if since > last or to < first:
                continue
            gap = begin - at
            if gap >= need and (room is None or gap < room):
                best, room = at, gap
            at = max(at, until)
        offsets[index] = at if best is None else best
        bisect.insort(placed, (offsets[index], offsets[index] + need, first, last))
        end = max(end, offsets[index] + need)
    return offsets, end


def order(uses: Sequence[Sequence[int]], spans: Mapping[int, tuple[int, int]]) -> list[list[int]]:
    """Return for each step which earlier ones it must wait for, given the buffers that each uses.

    Two steps that touch the same bytes run one after the other, whether they read or write; what
    follows from the other edges is left out.
    """
    names = list(spans)
    begins, ends = (np.array([spans[name][side] for name in names]) for side in (0, 1))
    meets = (begins[:, None] < ends[None]) & (begins[None] < ends[:, None])
    touch = {name: 1 << bit for bit, name in enumerate(names)}
    bits = np.packbits(meets, axis=1, bitorder="little")
    meet = {name: int.from_bytes(row.tobytes(), "little") for name, row in zip(names, bits)}
    touched: list[int] = []
    before: list[int] = []  # for each step a bit for every step that is sure to have ended
    after: list[list[int]] = []
    for number, used in enumerate(uses):
        wanted = functools.reduce(int.__or__, (meet[name] for name in used), 0)
        waits, known, everything = [], 0, (1 << number) - 1
        for earlier in range(number - 1, -1, -1):
            if known == everything:
                break
            if not known >> earlier & 1 and touched[earlier] & wanted:
                waits.append(earlier)
                known |= before[earlier] | 1 << earlier
        touched.append(functools.reduce(int.__or__, (touch[name] for name in used), 0))
        before.append(known)
        after.append(waits)
    return after
