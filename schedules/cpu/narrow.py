"""Narrows activations in lanes to fewer bits: what a layer in bfloat16 or bytes reads (see
``arithmetic``).

    quantize (m, C, 16), [smooth (C)], [limits (2)]  →  bytes (m, C / 4, 16), [range (m, 2, 16)]
    to_bf16  (m, C, 16)                              →  (m, C / 2, 16)

``kind`` "int8" finds the range of each token, "int8_static" is given one for all of them as
``limits``: low, and steps per unit. The same words end the kernels that normalise (``layer_norm``,
``embedding``), so that the values are narrowed while they are in the first-level cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from bertile.schedules import BLOCK_TOKENS
from bertile.schedules.cpu import arithmetic, lanes
from bertile.schedules.cpu.lanes import KernelBuilder
from bertile.schedules.reference import LEVELS, byte_limits
from bertile.schedules.schedule import Knobs, Row, Sample, Schedule, Space
from bertile.schedules.task import Task

KINDS = ("bf16", "int8", "int8_static")
HIGHEST = 3e38  # above any value
STATIC = (-5.0, 5.0)  # the range of a sample's values


@dataclass
class Narrow:
    """The extra operands and results of a kernel that writes its values in a narrow form too.

    Inputs are declared before the results, as the kernel's signature has them.
    """

    kind: str
    channels: int
    smooth: Any = None
    limits: Any = None
    values: Any = None
    range: Any = None
    watched: list[Any] = field(default_factory=list)

    @staticmethod
    def of(task: Task) -> Narrow | None:
        """What the task's ``kind`` asks for; None for a task that has none."""
        kind = task.shape.get("kind")
        return Narrow(str(kind), int(task.shape["channels"])) if kind else None

    def declare_inputs(self, builder: KernelBuilder, smooth: bool) -> None:
        """``smooth`` (C) and ``limits`` (2), where the kind has them."""
        if smooth:
            self.smooth = builder.tensor("smooth", self.channels)
        if self.kind == "int8_static":
            self.limits = builder.tensor("limits", 2)

    def declare_results(self, builder: KernelBuilder) -> None:
        """The packed values, and the range that was found."""
        group = 2 if self.kind == "bf16" else 4
        self.values = builder.activation("values", -(-self.channels // group), "int32")
        if self.kind == "int8":
            self.range = builder.activation("range", 2)

    def emit(self, value: Callable[[Any], Any], block: Any) -> None:
        """Narrow a block; ``value(c)`` is channel c's vector, and may be asked for twice."""
        if self.kind == "bf16":
            self._bf16(value, block)
            return

        def smoothed(c: Any) -> Any:
            return self._smoothed(value(c), c)

        if self.kind == "int8_static":
            low, inverse = (lanes.splat(self.limits[i]) for i in range(2))
        else:
            low, inverse = self._range(smoothed, block)
        self._bytes(smoothed, block, low, inverse)

    def _bf16(self, value: Callable[[Any], Any], block: Any) -> None:
        with T.serial(self.channels // 2) as i:
            packed = arithmetic.pack_bf16(value(2 * i), value(2 * i + 1))
            lanes.store(self.values, packed, block, i)
        if self.channels % 2:
            packed = arithmetic.pack_bf16(value(self.channels - 1), lanes.splat(0.0))
            lanes.store(self.values, packed, block, self.channels // 2)

    def watch(self) -> Callable[[Any, Any], None]:
        """To be called with every value and its channel while a kernel makes them, before ``emit``:
        so that the range of each token, where it is wanted, needs no pass of its own.
        """
        if self.kind != "int8":
            return lambda value, c: None
        self._open(1)
        return lambda value, c: self._see(self._smoothed(value, c), 0)

    def _smoothed(self, value: Any, c: Any) -> Any:
        return value if self.smooth is None else value * lanes.splat(self.smooth[c])

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

    def _bytes(self, value: Callable[[Any], Any], block: Any, low: Any, inverse: Any) -> None:
        def steps(c: Any) -> Any:
            level = arithmetic.steps(value(c), low, inverse)
            return arithmetic.clamp(level) if self.range is None else level

        with T.serial(self.channels // 4) as i:
            packed = arithmetic.pack_bytes([steps(4 * i + j) for j in range(4)])
            lanes.store(self.values, packed, block, i)
        if rest := self.channels % 4:
            first = self.channels - rest
            packed = arithmetic.pack_bytes([steps(first + j) for j in range(rest)])
            lanes.store(self.values, packed, block, self.channels // 4)


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
    if task.shape.get("kind") == "int8_static":
        low, high = STATIC
        weights.append(byte_limits(low, high))
    return weights


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
    kind, (tokens, channels) = str(task.shape["kind"]), narrowed.shape
    blocks, group = tokens // BLOCK_TOKENS, 2 if kind == "bf16" else 4
    results = [] if wide is None else [np.zeros((blocks, channels, BLOCK_TOKENS), "float32")]
    results.append(np.zeros((blocks, -(-channels // group), BLOCK_TOKENS), "int32"))
    low, high = STATIC
    if kind == "int8_static":
        narrowed = np.clip(narrowed, low, high)
    expected = narrowed if wide is None else np.stack([wide, narrowed])
    largest = max(1.0, float(np.abs(expected).max()))
    if kind == "bf16":
        tolerance = 2.0**-8
    elif kind == "int8":
        results.append(np.zeros((blocks, 2, BLOCK_TOKENS), "float32"))
        spread = float((narrowed.max(1) - narrowed.min(1)).max())
        tolerance = 0.51 * spread / LEVELS / largest
    else:
        tolerance = 0.51 * (high - low) / LEVELS / largest

    def decode(buffers: list[np.ndarray]) -> np.ndarray:
        first = 0 if wide is None else 1
        if kind == "bf16":
            rows = arithmetic.bf16_rows(buffers[first])
        elif kind == "int8":
            rows = arithmetic.dequantized_rows(buffers[first], buffers[first + 1])
        else:
            step = (high - low) / LEVELS
            rows = low + step * arithmetic.ungrouped(buffers[first], "uint8").astype("float32")
        rows = rows[:, :channels]
        return rows if wide is None else np.stack([lanes.from_lanes(buffers[0]), rows])

    return Sample(activations, weights, expected, results, decode, tolerance)


def flops(task: Task, tokens: int) -> float:
    """Four per value: smallest, largest, difference, product; packing is not counted."""
    return 4.0 * tokens * task.shape["channels"]


narrow = Schedule("narrow", _no_space, _default, kernel, sample, flops)
