"""Defines what every schedule states: the maths of an operation, the knobs it may vary, and the
kernel for a choice of knobs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from bertile.schedules.task import Task

Knobs = dict[str, int]
Space = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Gpu:
    """The facts of a GPU; sizes of memory in bytes, ``multiprocessors`` of a typical card."""

    capability: int  # 75, 80, 86, 89, 90
    shared_per_block: int  # the most dynamic shared memory that a block may ask for
    shared_per_sm: int
    multiprocessors: int
    bf16: bool  # in tensor cores
    async_copy: bool  # cp.async
    wgmma: bool
    registers_per_sm: int = 65536
    threads_per_sm: int = 2048


class Row(Protocol):
    """The facts of a machine that schedules ask for (a row of ``bertile.targets.rows.rows``)."""

    arch: str  # whose intrinsics
    registers: int  # architectural vector registers
    vector_bits: int  # width of one of them
    dot_product: str | None  # "vnni", "sdot", "usmmla": four bytes at once
    bf16: bool  # two bfloat16 at once
    tiles: bool  # 16 by 16 sums at once, of bytes and of bfloat16 (AMX)
    gpu: Gpu | None
    threads: int  # that a kernel is made for; any number may run it


@dataclass(frozen=True)
class Sample:
    """Arguments for one trial run of a kernel, and what it must compute.

    Weights are drawn before activations: they are the same for every number of blocks.

    ``activations`` come before the weights in the kernel's signature, the results come last.
    ``expected`` is what ``decode`` makes of them. ``symbols`` are the extents of a request (rows,
    batch, length, blocks) that a launch on a GPU is made for.
    """

    activations: Sequence[np.ndarray]
    weights: Sequence[np.ndarray]
    expected: np.ndarray
    results: Sequence[np.ndarray] = ()  # zeros of each result's form; () is one like ``expected``
    decode: Callable[[list[np.ndarray]], np.ndarray] = lambda results: results[0]
    tolerance: float = 1e-4  # relative to the largest magnitude expected (at least 1)
    symbols: Mapping[str, int] = field(default_factory=dict)

    def buffers(self) -> list[np.ndarray]:
        """Arrays for the results, in the kernel's order."""
        return [np.zeros_like(array) for array in self.results or [self.expected]]

    def mistake(self, results: list[np.ndarray]) -> str | None:
        """What is wrong with what a kernel gave, None if nothing is."""
        scale = max(1.0, float(np.abs(self.expected).max()))
        difference = float(np.abs(self.decode(results) - self.expected).max())
        if difference <= self.tolerance * scale:
            return None
        return f"wrong result: off by {difference:.2g} of {scale:.2g}"


@dataclass(frozen=True)
class Schedule:
    """How one operation runs on one kind of machine.

    The kernel's arguments are the activations, the packed weights and the result, in this order.
    Every space has a default that is good without tuning. ``parts`` names the arrays that the first
    weight is packed into, where they are several: the values of what is not zero first. ``refuses``
    names what a task asks for that no kernel here has; None where there is nothing. ``later`` are
    knobs that records may lack, with what kernels did before these were there.
    """

    operation: str
    space: Callable[[Task, Row], Space]
    default: Callable[[Task, Row], Knobs]
    kernel: Callable[[Task, Knobs, Row], Any]  # -> tvm.tirx.PrimFunc or, on a GPU, Kernel
    sample: Callable[[Task, int, np.random.Generator], Sample]  # (task, blocks of tokens, rng)
    flops: Callable[[Task, int], float]  # (task, tokens), of a sequence of that many tokens
    pack: Callable[[Task, Knobs, Sequence[np.ndarray], Row], list[np.ndarray]] = (
        lambda task, knobs, weights, row: list(weights)
    )
    parts: tuple[str, ...] = ()
    refuses: Callable[[Task], str | None] = lambda task: None
    later: Mapping[str, int] = field(default_factory=dict)

    def valid(self, task: Task, row: Row, knobs: Mapping[str, int]) -> bool:
        """Whether these decisions (of another shape, say) lie in this task's space."""
        space = self.space(task, row)
        return set(space) == set(knobs) and all(knobs[k] in space[k] for k in space)
