"""Holds a row for each precision that a matrix product of a processor multiplies in.

To add one: its row here, and in ``dense_samples`` the operands that it is tried on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from bertile.schedules.cpu.arithmetic import BF16, FP16, FP32, Arithmetic, bf16_pairs
from bertile.schedules.cpu.vector_math import ACTIVATIONS, ACTIVATIONS_BF16, ACTIVATIONS_INT8
from bertile.schedules.intrinsics import arm, llvm, x86
from bertile.schedules.schedule import Row
from bertile.schedules.task import Task


@dataclass(frozen=True)
class Precision:
    """``arithmetic`` is what one multiply-add is on a machine, of ``group`` channels; ``stored``
    what becomes of a weight before its channels share a lane; ``activations`` are computed as
    exactly as the operands are. Sums of ``in_bytes`` have a scale; ``per_token`` operands have a
    range of each token, and a shift of each channel for it. ``grouped`` weights are stored in 4
    bits, with a scale of each output for the task's ``group`` inputs (``nibbles``). What is
    ``tiled`` is multiplied by tiles where a machine has those (``tiles``).
    """

    arithmetic: Callable[[Row], Arithmetic]
    group: int = 1
    stored: Callable[[np.ndarray], np.ndarray] = lambda w: w
    activations: Mapping[str, Callable] = field(default_factory=lambda: ACTIVATIONS)
    per_token: bool = False
    grouped: bool = False
    tiled: bool = False

    @property
    def in_bytes(self) -> bool:
        """Whether a channel is one byte."""
        return self.group == 4


def of(task: Task) -> Precision:
    """The row of a task."""
    return PRECISIONS[name(task)]


def name(task: Task) -> str:
    """The row's name: fp32, fp16 (as fp32, of stored halves), bf16, int8, int8_static, int4, and
    int8_bounded, int8_bounded_static, whose weights ``reference.BOUND`` holds for.
    """
    return str(task.shape.get("precision", "fp32"))


def arithmetic(precision: str, row: Row) -> Arithmetic:
    """What one multiply-add is in a precision, by name, on a machine."""
    return PRECISIONS[precision].arithmetic(row)


def _fp16(row: Row) -> Arithmetic:
    if row.arch != "aarch64":
        return FP16
    return replace(FP16, llvm=llvm.HALF + arm.HALVES + arm.LANES, by_lane=True)


def _bf16(row: Row) -> Arithmetic:
    if row.arch != "aarch64":
        return BF16
    return replace(BF16, llvm=arm.DOT2_BF16, matrix=arm.MATRIX_BF16 + arm.SHUFFLES)


def _int8(row: Row) -> Arithmetic:
    bytes_ = Arithmetic(4, "int32", "int32", "bertile_dot4")
    if row.arch != "aarch64":
        if row.dot_product == "vnni":
            return replace(bytes_, llvm=x86.DOT4_VNNI)
        text = x86.PAIRS_AVX512 if row.vector_bits == 512 else x86.PAIRS_AVX2
        return replace(bytes_, llvm=text, pairs="bertile_pairs")
    if row.dot_product == "usmmla":
        matrix = arm.MATRIX_INT8 + arm.SHUFFLES
        return replace(bytes_, llvm=arm.DOT4_USDOT, matrix=matrix)
    sdot, neon = arm.DOT4_SDOT + arm.SIGNED, arm.DOT4_NEON + arm.SIGNED_NEON
    text = (sdot if row.dot_product == "sdot" else neon) + arm.LANES
    return replace(bytes_, llvm=text, signed=True, by_lane=True)


def _bounded(row: Row) -> Arithmetic:
    """Bytes of bounded weights: exact in less, where four cannot be multiplied at once."""
    bytes_ = _int8(row)
    return replace(bytes_, pairs="", run=2) if bytes_.pairs else bytes_


def _int4(row: Row) -> Arithmetic:
    """Bytes by bytes that are broadcast from where they were unpacked to; levels from -8 to 7,
    where 16 products of those make a sum of 16 bits.
    """
    bytes_ = _int8(row)
    runs = {"pairs": "", "run": 8} if bytes_.pairs else {}
    return replace(bytes_, llvm=bytes_.llvm + llvm.HALF, matrix="", by_lane=False, **runs)


def _halves(w: np.ndarray) -> np.ndarray:
    return w.astype("float16").view("int16")


def _upper_halves(w: np.ndarray) -> np.ndarray:
    return bf16_pairs(w[..., None].repeat(2, -1)).view("uint16")[..., 0]


PRECISIONS: Mapping[str, Precision] = {
    "fp32": Precision(lambda row: FP32),
    "fp16": Precision(_fp16, stored=_halves),
    "bf16": Precision(_bf16, 2, _upper_halves, ACTIVATIONS_BF16, tiled=True),
    "int8": Precision(_int8, 4, activations=ACTIVATIONS_INT8, per_token=True, tiled=True),
    "int8_static": Precision(_int8, 4, activations=ACTIVATIONS_INT8, tiled=True),
    "int8_bounded": Precision(_bounded, 4, activations=ACTIVATIONS_INT8, per_token=True),
    "int8_bounded_static": Precision(_bounded, 4, activations=ACTIVATIONS_INT8),
    "int4": Precision(
        _int4, 4, activations=ACTIVATIONS_INT8, per_token=True, grouped=True, tiled=True
    ),
}
