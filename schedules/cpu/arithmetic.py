"""Says what one multiply-add is in each precision, and how activations lie in memory for it.

A lane is 32 bits of one token: one float32 channel, two neighbouring bfloat16 channels, or four
neighbouring unsigned bytes. So an activation of C channels is

    fp32   (m, C, 16) float32
    bf16   (m, C / 2, 16) int32, channel 2 i in the low half
    int8   (m, C / 4, 16) int32, channel 4 i in the lowest byte

and a weight of the same channels is broadcast as one number of 32 bits. Bytes stand for
low + scale × byte; ``scale`` and ``low`` are (m, 2, 16) where each token has its own, and are
folded into the weights of the layer that reads them where all tokens share them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from bertile.schedules import BLOCK_TOKENS
from bertile.schedules.cpu.lanes import splat
from bertile.schedules.cpu.vector_math import ROUND
from bertile.schedules.intrinsics import llvm, x86
from bertile.schedules.reference import LEVELS

ROUND_BITS = 0x4B400000  # of ``vector_math.ROUND``


@dataclass(frozen=True)
class Arithmetic:
    """Vectors of 16 lanes of ``group`` channels, multiplied and added up in ``total``.

    ``weight`` is the dtype in which a lane's weights are stored. ``signed`` bytes are multiplied
    less 128 (see ``inputs``), and sums want 128 times the sum of the weights. Weights ``by_lane``
    are loaded several at once (``spread_row``). ``matrix`` is the text of a function that
    multiplies two tokens by two outputs, where the machine has one. ``pairs`` names the function
    that multiplies two channels of 16 bits, where the machine has none for four bytes: what is
    multiplied often is widened once (``wide``); ``function`` there takes bytes as they are, of
    weights that ``halves`` has made. Of a ``run`` of lanes products are summed in 16 bits, which
    their weights are bounded for (``reference.BOUND``), and widened once.
    """

    group: int
    lane: str
    total: str
    function: str = ""
    llvm: str = ""  # the function's text
    weight: str = ""
    signed: bool = False
    by_lane: bool = False
    matrix: str = ""
    pairs: str = ""
    run: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", self.weight or self.lane)

    def spread(self, w: Any) -> Any:
        """One lane's weights in all lanes."""
        if self.weight != "int16":
            return splat(w)
        return from_halves(tirx.Broadcast(w, BLOCK_TOKENS))

    def spread_row(self, w: Any, index: tuple, count: int) -> Iterator[Any]:
        """Each of the weights ``w[*index, 0:count]`` in all lanes, from registers of several."""
        at = 0
        while at < count:
            some = next(n for n in (4, 2, 1) if n <= count - at)
            if some == 1:
                yield T.Bind(self.spread(w[(*index, at)]))
            else:
                several = w[(*index, tirx.Ramp(at, 1, some))]
                if self.weight == "int16":
                    several = tirx.call_extern(f"int32x{some}", f"bertile_halves{some}", several)
                several = T.Bind(several)
                for i in range(some):
                    name = f"bertile_lane{i}of{some}"
                    value = tirx.call_extern(f"int32x{BLOCK_TOKENS}", name, several)
                    yield T.Bind(tirx.reinterpret(f"{self.lane}x{BLOCK_TOKENS}", value))
            at += some

    def multiply_add(self, total: Any, x: Any, w: Any) -> Any:
        """total + x · w, the product of each lane's channels."""
        if not self.function:
            return total + x * w
        return tirx.call_extern(f"{self.total}x{BLOCK_TOKENS}", self.function, total, x, w)

    @property
    def parts(self) -> int:
        """Vectors that a lane of four bytes makes where it is widened."""
        return 2 if self.pairs else 1

    def wide(self) -> Arithmetic:
        """The arithmetic of lanes that were widened; of others, this one."""
        return replace(self, function=self.pairs or self.function, weight=self.lane)

    @property
    def unpacked(self) -> bool:
        """Whether weights are made ready in a buffer (see ``panels``), not at each product."""
        return bool(self.pairs) or (self.weight == "int16" and not self.by_lane)

    def multiply_run(self, total: Any, xs: Sequence[Any], ws: Sequence[Any]) -> Any:
        """total + Σ x · w of up to ``run`` lanes."""
        lane = f"int32x{BLOCK_TOKENS}"
        products = [tirx.call_extern(lane, "bertile_bytes", *both) for both in zip(xs, ws)]
        shorts = reduce(lambda a, b: tirx.call_extern(lane, "bertile_shorts", a, b), products)
        return tirx.call_extern(lane, "bertile_widened", total, shorts)

    @property
    def together(self) -> int:
        """Lanes of an output whose weights lie side by side, since a step multiplies them all."""
        return 2 if self.matrix else self.run

    def multiply_matrix(self, total: Any, x: Any, w: Any) -> Any:
        """total + x w of two lanes, by registers: x of two tokens, w of two outputs."""
        name = f"bertile_matrix{self.group}"
        return tirx.call_extern(f"{self.total}x{BLOCK_TOKENS}", name, total, x, w)

    def zero(self) -> Any:
        """A vector of zeros to add up on."""
        return tirx.Broadcast(tirx.const(0, self.total), BLOCK_TOKENS)

    def lanes(self, channels: int) -> int:
        """Vectors that so many channels take."""
        return -(-channels // self.group)


FP32 = Arithmetic(1, "float32", "float32")
FP16 = Arithmetic(1, "float32", "float32", "", llvm.HALF, "int16")
BF16 = Arithmetic(2, "int32", "float32", "bertile_dot2", x86.DOT2_BF16)


# On vectors of a kernel.


def from_halves(value: Any) -> Any:
    """16 numbers of float16, as float32."""
    return tirx.call_extern(f"float32x{BLOCK_TOKENS}", "bertile_half", value)


def wide_inputs(value: Any) -> list[Any]:
    """The two 16-bit vectors of lanes of four unsigned bytes: of two channels each."""
    return _both("bertile_pair", value)


def wide_weights(value: Any) -> list[Any]:
    """Lanes of four signed bytes as 16-bit integers in their order: two vectors."""
    return _both("bertile_wide", value)


def _both(name: str, value: Any) -> list[Any]:
    lane = f"int32x{BLOCK_TOKENS}"
    return [T.Bind(tirx.call_extern(lane, f"{name}{half}", value)) for half in range(2)]


def pack_bf16(low: Any, high: Any) -> Any:
    """Two float32 vectors as pairs of bfloat16, rounded to nearest, ties away from zero."""
    half = tirx.Broadcast(tirx.const(0x8000, "int32"), BLOCK_TOKENS)
    low = tirx.reinterpret(f"int32x{BLOCK_TOKENS}", low) + half
    high = tirx.reinterpret(f"int32x{BLOCK_TOKENS}", high) + half
    mask = tirx.Broadcast(tirx.const(-65536, "int32"), BLOCK_TOKENS)
    # the sign that a right shift brings in from the left is masked away by the other half
    return (high & mask) | ((low >> _sixteen()) & ~mask)


def pack_bf16_tokens(value: Any) -> Any:
    """A float32 vector as 8 pairs of bfloat16 of neighbouring tokens."""
    half = tirx.Broadcast(tirx.const(0x8000, "int32"), BLOCK_TOKENS)
    bits = (tirx.reinterpret(f"int32x{BLOCK_TOKENS}", value) + half) >> _sixteen()
    return tirx.reinterpret(f"int32x{BLOCK_TOKENS // 2}", bits.astype(f"int16x{BLOCK_TOKENS}"))


def _sixteen() -> Any:
    return tirx.Broadcast(tirx.const(16, "int32"), BLOCK_TOKENS)


def pack_bytes(values: Sequence[Any]) -> Any:
    """Four vectors of floats between 0 and 255 as bytes, rounded to nearest."""
    total = None
    for place, value in enumerate(values):
        bits = tirx.reinterpret(f"int32x{BLOCK_TOKENS}", value + splat(ROUND))
        if place:
            bits = bits << tirx.Broadcast(tirx.const(8 * place, "int32"), BLOCK_TOKENS)
        total = bits if total is None else total + bits
    surplus = sum(ROUND_BITS << (8 * place) for place in range(len(values))) & 0xFFFFFFFF
    surplus -= (surplus >> 31) << 32  # as a signed number
    return total - tirx.Broadcast(tirx.const(surplus, "int32"), BLOCK_TOKENS)


def steps(value: Any, low: Any, inverse: Any) -> Any:
    """How many steps a vector of values lies above ``low``, not yet rounded."""
    return (value - low) * inverse


def clamp(value: Any) -> Any:
    """Steps of a value that may lie outside the range."""
    return tirx.min(tirx.max(value, splat(0.0)), splat(float(LEVELS)))


def store_range(made_range: Any, block: Any, low: Any, high: Any) -> tuple[Any, Any]:
    """Write scale and low of a block's tokens; gives (low, steps per unit) to quantize with."""
    spread = T.Bind(tirx.max(high - low, splat(1e-30)))
    ramp = tirx.Ramp(0, 1, BLOCK_TOKENS)
    T.buffer_store(made_range, spread * splat(1.0 / LEVELS), [block, 0, ramp])
    T.buffer_store(made_range, low, [block, 1, ramp])
    return low, T.Bind(splat(float(LEVELS)) / spread)


# On arrays.


def halves(w: np.ndarray) -> np.ndarray:
    """Lanes (K / 4, N) int32 of signed bytes → (K / 4, 2, N), whose sum they are.

    No two neighbouring bytes of a lane add up to more than 128 or less than -128, so that products
    with unsigned bytes stay within 16 bits. The second is zero where a lane is so already.
    """
    pairs = np.ascontiguousarray(w).view("int8").reshape(*w.shape, 4).astype("int16")
    far = np.abs(pairs.reshape(*w.shape, 2, 2).sum(-1)) > 128
    half = np.where(far.any(-1, keepdims=True), pairs >> 1, 0)
    both = np.stack([pairs - half, half], 1).astype("int8")
    return np.ascontiguousarray(both).view("int32")[..., 0]


def bf16_pairs(x: np.ndarray) -> np.ndarray:
    """(…, 2 n) float32 → (…, n) int32, rounded as :func:`pack_bf16` does."""
    bits = np.ascontiguousarray(x, "float32").view("uint32") + np.uint32(0x8000)
    halves = (bits >> np.uint32(16)).astype("uint16")
    return np.ascontiguousarray(halves).view("int32")


def bf16_values(pairs: np.ndarray) -> np.ndarray:
    """(…, n) int32 → (…, 2 n) float32."""
    halves = np.ascontiguousarray(pairs).view("uint16")
    return (halves.astype("uint32") << np.uint32(16)).view("float32")


def grouped(rows: np.ndarray, group: int) -> np.ndarray:
    """(tokens, C) of 16 or 8 bits → (m, C / group, 16) int32 in lanes; zeros where either is
    short.
    """
    tokens, channels = rows.shape
    blocks, wide = -(-tokens // BLOCK_TOKENS), -(-channels // group)
    padded = np.zeros((blocks * BLOCK_TOKENS, wide * group), rows.dtype)
    padded[:tokens, :channels] = rows
    packed = np.ascontiguousarray(padded).view("int32")
    return np.ascontiguousarray(packed.reshape(blocks, BLOCK_TOKENS, wide).transpose(0, 2, 1))


def ungrouped(lanes: np.ndarray, dtype: str) -> np.ndarray:
    """(m, C / group, 16) int32 → (m * 16, C) of ``dtype``, the inverse of :func:`grouped`."""
    blocks, wide, _ = lanes.shape
    rows = np.ascontiguousarray(lanes.transpose(0, 2, 1).reshape(blocks * BLOCK_TOKENS, wide))
    return rows.view(dtype)


def bf16_lanes(rows: np.ndarray) -> np.ndarray:
    """(tokens, C) float32 → (m, C / 2, 16) int32."""
    return grouped(bf16_pairs(rows).view("uint16"), 2)


def bf16_rows(lanes: np.ndarray) -> np.ndarray:
    """(m, C / 2, 16) int32 → (m * 16, C) float32."""
    blocks, wide, _ = lanes.shape
    rows = np.ascontiguousarray(lanes.transpose(0, 2, 1).reshape(blocks * BLOCK_TOKENS, wide))
    return bf16_values(rows)


def quantized_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, C) float32 → bytes (tokens, C), scale (tokens,), low (tokens,): a range a token."""
    low, high = rows.min(1), rows.max(1)
    spread = np.maximum(high - low, np.float32(1e-30))
    inverse = np.float32(LEVELS) / spread
    bytes_ = np.rint((rows - low[:, None]) * inverse[:, None]).astype("uint8")
    return bytes_, spread * np.float32(1.0 / LEVELS), low


def range_lanes(scale: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Scale and low of each token (m * 16,) → (m, 2, 16) float32."""
    both = np.stack([scale, low], 1).astype("float32")
    return np.ascontiguousarray(both.reshape(-1, BLOCK_TOKENS, 2).transpose(0, 2, 1))


def dequantized_rows(bytes_: np.ndarray, range_: np.ndarray) -> np.ndarray:
    """Bytes (m, C / 4, 16) int32 and ranges (m, 2, 16) → (m * 16, C) float32."""
    per_token = range_.transpose(0, 2, 1).reshape(-1, 2)
    return per_token[:, 1:] + per_token[:, :1] * ungrouped(bytes_, "uint8").astype("float32")


def bf16_qkv_lanes(rows: np.ndarray, split: int) -> np.ndarray:
    """Q, K and V (tokens, C) → (m, C / 2, 16) int32: V, from channel ``split`` on, in pairs of
    tokens.
    """
    tokens, channels = rows.shape
    blocks = -(-tokens // BLOCK_TOKENS)
    values = np.zeros((blocks * BLOCK_TOKENS, channels - split), "float32")
    values[:tokens] = rows[:, split:]
    by_token = values.reshape(blocks, BLOCK_TOKENS, -1).transpose(0, 2, 1)  # (m, C, 16)
    paired = bf16_pairs(by_token).reshape(blocks, -1, BLOCK_TOKENS)
    return np.concatenate([bf16_lanes(rows[:, :split]), paired], 1)
