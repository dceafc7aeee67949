"""Narrows activations in lanes to fewer bits: what a layer in bfloat16 or bytes reads (see
``arithmetic``).

    quantize (m, C, 16), [smooth (C)], [limits (2)]  →  bytes (m, C / 4, 16), [range (m, 2, 16)]
    to_bf16  (m, C, 16)                              →  (m, C / 2, 16)

``kind`` "int8" finds the range of each token, "int8_static" is given one for all of them as
``limits``: low, and steps per unit. The same words end the kernels that normalise (``layer_norm``,
``embedding``), so that the values are narrowed while they are in the first-level cache.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, ClassVar

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from bertile.schedules import BLOCK_TOKENS
from bertile.schedules.cpu import arithmetic, lanes
from bertile.schedules.cpu.lanes import KernelBuilder
from bertile.schedules.reference import LEVELS, byte_limits
from bertile.schedules.schedule import Knobs, Row, Sample, Schedule, Space
from bertile.schedules.task import Task

HIGHEST = 3e38  # above any value
STATIC = (-5.0, 5.0)  # the range of a sample's values
STATIC_STEP = (STATIC[1] - STATIC[0]) / LEVELS


@dataclass
class Narrow(ABC):
    """A kind: the extra operands and results of a kernel that writes its values in it too.

    Inputs are declared before the results, as the kernel's signature has them.
    """

    channels: int
    smooth: Any = None
    values: Any = None

    group: ClassVar[int]  # channels that share a lane

    @staticmethod
    def of(task: Task) -> Narrow | None:
        """What the task's ``kind`` asks for; None for a task that has none."""
        kind = task.shape.get("kind")
        return KINDS[str(kind)](int(task.shape["channels"])) if kind else None

    def declare_inputs(self, builder: KernelBuilder, smooth: bool) -> None:
        """``smooth`` (C) where it is asked for, and what else the kind reads."""
        if smooth:
            self.smooth = builder.tensor("smooth", self.channels)

    def declare_results(self, builder: KernelBuilder) -> None:
        """The packed values, and what else the kind writes."""
        self.values = builder.activation("values", -(-self.channels // self.group), "int32")

    @abstractmethod
    def emit(self, value: Callable[[Any], Any], block: Any) -> None:
        """Narrow a block; ``value(c)`` is channel c's vector, and may be asked for twice."""

    def watch(self) -> Callable[[Any, Any], None]:
        """To be called with every value and its channel while a kernel makes them, before ``emit``:
        so that the range of each token, where it is wanted, needs no pass of its own.
        """
        return lambda value, c: None

    def weights(self) -> list[np.ndarray]:
        """Of a sample, what the kind reads beside ``smooth``."""
        return []

    def seen(self, values: np.ndarray) -> np.ndarray:
        """What is left of a sample's values (tokens, C) before they are rounded."""
        return values

    def results(self, tokens: int) -> list[np.ndarray]:
        """Zeros in the form of the results."""
        wide = -(-self.channels // self.group)
        return [np.zeros((tokens // BLOCK_TOKENS, wide, BLOCK_TOKENS), "int32")]

    @abstractmethod
    def rows(self, results: list[np.ndarray]) -> np.ndarray:
        """(tokens, C) float32 that results stand for."""

    @abstractmethod
    def tolerance(self, values: np.ndarray, largest: float) -> float:
        """What rounding a sample's values may change, relative to the largest expected one."""

    def _smoothed(self, value: Any, c: Any) -> Any:
        return value if self.smooth is None else value * lanes.splat(self.smooth[c])


class Halves(Narrow):
    """bfloat16."""

    group = 2

    def emit(self, value: Callable[[Any], Any], block: Any) -> None:
        with T.serial(self.channels // 2) as i:
            packed = arithmetic.pack_bf16(value(2 * i), value(2 * i + 1))
            lanes.store(self.values, packed, block, i)
        if self.channels % 2:
            packed = arithmetic.pack_bf16(value(self.channels - 1), lanes.splat(0.0))
            lanes.store(self.values, packed, block, self.channels // 2)

    def rows(self, results: list[np.ndarray]) -> np.ndarray:
        return arithmetic.bf16_rows(results[0])

    def tolerance(self, values: np.ndarray, largest: float) -> float:
        return 2.0**-8


@dataclass
class Bytes(Narrow):
    """Bytes in the range of each token."""

    range: Any = None
    watched: list[Any] = field(default_factory=list)

    group = 4

    def declare_results(self, builder: KernelBuilder) -> None:
        super().declare_results(builder)
        self.range = builder.activation("range", 2)

    def emit(self, value: Callable[[Any], Any], block: Any) -> None:
        def smoothed(c: Any) -> Any:
            return self._smoothed(value(c), c)

        low, inverse = self._range(smoothed, block)
        self._bytes(lambda c: arithmetic.steps(smoothed(c), low, inverse), block)

    def watch(self) -> Callable[[Any, Any], None]:
        self._open(1)
        return lambda value, c: self._see(self._smoothed(value, c), 0)

    def results(self, tokens: int) -> list[np.ndarray]:
        blocks = tokens // BLOCK_TOKENS
        return [*super().results(tokens), np.zeros((blocks, 2, BLOCK_TOKENS), "float32")]

    def rows(self, results: list[np.ndarray]) -> np.ndarray:
        return arithmetic.dequantized_rows(*results)

    def tolerance(self, values: np.ndarray, largest: float) -> float:
        return 0.51 * float((values.max(1) - values.min(1)).max()) / LEVELS / largest

    def _open(self, chains: int) -> None:
        """So many smallest values, then so many largest ones."""
        self.watched = lanes.registers(2 * chains)
        for place, register in enumerate(self.watched):
            lanes.write(register, lanes.splat(HIGHEST if place < chains else -HIGHEST))

    def _see(self, value: Any, chain: int) -> None:
        low, high = self.watched[chain], self.watched[chain + len(self.watched) // 2]
        value = T.Bind(value)
        lanes.write(low, tirx.min(lanes.read(low), value))
        lanes.write(high, tirx.max(lanes.read(high), value))

    def _range(self, value: Callable[[Any], Any], block: Any) -> tuple[Any, Any]:
        """The smallest and largest value of each token: watched, or found by as many chains as
        hide the latency.
        """
        if not self.watched:
            self._open(4 if self.channels % 4 == 0 else 1)
            chains = len(self.watched) // 2
            with T.serial(self.channels // chains) as i:
                for chain in range(chains):
                    self._see(value(i * chains + chain), chain)
        chains = len(self.watched) // 2
        ends = [lanes.read(register) for register in self.watched]
        low, high = reduce(tirx.min, ends[:chains]), reduce(tirx.max, ends[chains:])
        return arithmetic.store_range(self.range, block, T.Bind(low), T.Bind(high))

    def _bytes(self, steps: Callable[[Any], Any], block: Any) -> None:
        """Pack each channel's steps, four to a lane."""
        with T.serial(self.channels // 4) as i:
            packed = arithmetic.pack_bytes([steps(4 * i + j) for j in range(4)])
            lanes.store(self.values, packed, block, i)
        if rest := self.channels % 4:
            first = self.channels - rest
            packed = arithmetic.pack_bytes([steps(first + j) for j in range(rest)])
            lanes.store(self.values, packed, block, self.channels // 4)


@dataclass
class StaticBytes(Bytes):
    """Bytes in one range for all tokens."""

    limits: Any = None

    def declare_inputs(self, builder: KernelBuilder, smooth: bool) -> None:
        super().declare_inputs(builder, smooth)
        self.limits = builder.tensor("limits", 2)

    def declare_results(self, builder: KernelBuilder) -> None:
        Narrow.declare_results(self, builder)

    def emit(self, value: Callable[[Any], Any], block: Any) -> None:
        low, inverse = (lanes.splat(self.limits[i]) for i in range(2))

        def steps(c: Any) -> Any:
            smoothed = self._smoothed(value(c), c)
            return arithmetic.clamp(arithmetic.steps(smoothed, low, inverse))

        self._bytes(steps, block)

    def watch(self) -> Callable[[Any, Any], None]:
        return Narrow.watch(self)

    def weights(self) -> list[np.ndarray]:
        return [byte_limits(*STATIC)]

    def seen(self, values: np.ndarray) -> np.ndarray:
        return np.clip(values, *STATIC)

    def results(self, tokens: int) -> list[np.ndarray]:
        return Narrow.results(self, tokens)

    def rows(self, results: list[np.ndarray]) -> np.ndarray:
        levels = arithmetic.ungrouped(results[0], "uint8").astype("float32")
        return STATIC[0] + STATIC_STEP * levels

    def tolerance(self, values: np.ndarray, largest: float) -> float:
        return 0.51 * STATIC_STEP / largest


KINDS: dict[str, type[Narrow]] = {"bf16": Halves, "int8": Bytes, "int8_static": StaticBytes}


def _no_space(task: Task, row: Row) -> Space:
    return {}


def _default(task: Task, row: Row) -> Knobs:
    return {}


def kernel(task: Task, knobs: Knobs, row: Row) -> Any:
    """The PrimFunc (x, [smooth], [limits], values, [range])."""
    form = Narrow.of(task)
    with lanes.kernel(task.name) as builder:
        x = builder.activation("x", form.channels)
        form.declare_inputs(builder, bool(task.shape.get("smooth")))
        form.declare_results(builder)
        with T.parallel(builder.blocks) as block:
            form.emit(lambda c: lanes.load(x, block, c), block)
    return builder.func


def sample(task: Task, blocks: int, rng: np.random.Generator) -> Sample:
    """Values off centre, whose ranges differ between tokens."""
    channels = int(task.shape["channels"])
    weights = sample_weights(task, rng)
    x = rng.standard_normal((blocks * BLOCK_TOKENS, channels)).astype("float32")
    x = x * rng.uniform(0.1, 2.0, (len(x), 1)).astype("float32") + np.float32(0.3)
    smooth = weights[0] if task.shape.get("smooth") else 1.0
    return narrow_sample(task, [lanes.to_lanes(x)], weights, (x * smooth).astype("float32"))


def sample_weights(task: Task, rng: np.random.Generator) -> list[np.ndarray]:
    """Values of ``smooth`` and ``limits``, where the task has them."""
    weights = []
    if task.shape.get("smooth"):
        weights.append(rng.uniform(0.5, 2.0, int(task.shape["channels"])).astype("float32"))
    form = Narrow.of(task)
    return [*weights, *(form.weights() if form else [])]


def narrow_sample(
    task: Task,
    activations: list[np.ndarray],
    weights: list[np.ndarray],
    narrowed: np.ndarray,
    wide: np.ndarray | None = None,
) -> Sample:
    """The sample of a kernel that writes ``narrowed`` (tokens, C) in the task's kind, behind
    ``wide`` in float32 where that is given.
    """
    form, (tokens, channels) = Narrow.of(task), narrowed.shape
    in_lanes = (tokens // BLOCK_TOKENS, channels, BLOCK_TOKENS)
    results = [] if wide is None else [np.zeros(in_lanes, "float32")]
    narrowed = form.seen(narrowed)
    expected = narrowed if wide is None else np.stack([wide, narrowed])
    tolerance = form.tolerance(narrowed, max(1.0, float(np.abs(expected).max())))

    def decode(buffers: list[np.ndarray]) -> np.ndarray:
        rows = form.rows(buffers[len(results) :])[:, :channels]
        return rows if wide is None else np.stack([lanes.from_lanes(buffers[0]), rows])

    places = [*results, *form.results(tokens)]
    return Sample(activations, weights, expected, places, decode, tolerance)


def flops(task: Task, tokens: int) -> float:
    """Four per value: smallest, largest, difference, product; packing is not counted."""
    return 4.0 * tokens * task.shape["channels"]


narrow = Schedule("narrow", _no_space, _default, kernel, sample, flops)
