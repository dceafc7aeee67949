"""Tells whether ONNX Runtime adds products of bytes exactly on this processor."""

from __future__ import annotations

from bertile.loader import cpu_features


def sums_are_exact() -> bool:
    """Without VNNI it adds two products of u8 and s8 in 16 bits, and is wrong where that overflows:
    weights of seven bits never do, nor do unsigned ones, which it adds in 32 bits.
    """
    return bool({"avx512_vnni", "avx_vnni"} & cpu_features())
