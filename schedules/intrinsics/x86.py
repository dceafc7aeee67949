"""Writes x86 instructions that TVM cannot name as lines of LLVM IR that a kernel links and inlines.

Operands are vectors of 16 lanes of 32 bits, whatever the lanes hold: TVM has no bf16 vectors, and a
lane of four bytes is loaded, and broadcast, as one number.

    bertile_dot4(c, a, b)    c + Σ a[i] b[i], four unsigned bytes by four signed ones, exact
    bertile_dot2(c, a, b)    c + a[0] b[0] + a[1] b[1], two bfloat16 each, into float32
    bertile_pairs(c, a, b)   c + a[0] b[0] + a[1] b[1], two 16-bit integers each
    bertile_bytes(a, b)      pairs of unsigned bytes by signed ones, sums of 16 bits, two a lane
    bertile_shorts(a, b)     two such added
    bertile_widened(c, a)    c + a[0] + a[1], of two such
    bertile_wide0(a), 1      the signed bytes of 8 lanes as 16-bit integers, two a lane
    bertile_pair0(a), 1      the lower, the upper two unsigned bytes of each lane, likewise
    bertile_four(a)          four lanes, four times over
    bertile_pick0(a) to 3    one of those four everywhere
    bertile_index(a)         a, in a general register
    bertile_fraction(a)      a less the whole number below it, of floats
    bertile_scale(a, b)      a times two to the whole number below b, of floats

Without VNNI, bytes are multiplied by vpmaddubsw, whose sums of two products are cut at 16 bits: by
weights that cannot come so far (``reference.BOUND``, ``arithmetic.halves``), or, where these must
stay as they are and side by side, as 16-bit integers by vpmaddwd. All make the same integers as
VNNI does.
"""

from __future__ import annotations

from collections.abc import Sequence


def _dot(name: str, total: str, operand: str, intrinsic: str) -> str:
    """A function that is one instruction, on operands that it names otherwise."""
    return f"""
declare {total} @{intrinsic}({total}, {operand}, {operand})
define linkonce_odr {total} @{name}({total} %c, <16 x i32> %a, <16 x i32> %b) alwaysinline {{
  %x = bitcast <16 x i32> %a to {operand}
  %y = bitcast <16 x i32> %b to {operand}
  %r = call {total} @{intrinsic}({total} %c, {operand} %x, {operand} %y)
  ret {total} %r
}}
"""


DOT4_VNNI = _dot("bertile_dot4", "<16 x i32>", "<64 x i8>", "llvm.x86.avx512.vpdpbusd.512")
DOT2_BF16 = _dot(
    "bertile_dot2", "<16 x float>", "<32 x bfloat>", "llvm.x86.avx512bf16.dpbf16ps.512"
)


def _pick(i: int) -> str:
    picked = ", ".join(f"i32 {lane // 4 * 4 + i}" for lane in range(16))
    return f"""
define linkonce_odr <16 x i32> @bertile_pick{i}(<16 x i32> %a) alwaysinline {{
  %r = shufflevector <16 x i32> %a, <16 x i32> poison, <16 x i32> <{picked}>
  ret <16 x i32> %r
}}
"""


# Empty assembly that LLVM cannot see through: else it would make four broadcasts from memory of the
# shuffles, and vectors of the indices, which then have to come back one by one.
FOUR = f"""
define linkonce_odr <16 x i32> @bertile_four(<4 x i32> %a) alwaysinline {{
  %w = shufflevector <4 x i32> %a, <4 x i32> poison,
    <16 x i32> <{", ".join(f"i32 {lane % 4}" for lane in range(16))}>
  %r = call <16 x i32> asm "", "=v,0"(<16 x i32> %w)
  ret <16 x i32> %r
}}
{"".join(map(_pick, range(4)))}"""

INDEX = """
define linkonce_odr i64 @bertile_index(i64 %a) alwaysinline {
  %r = call i64 asm "", "=r,0"(i64 %a)
  ret i64 %r
}
"""

_SCALING = "<16 x float> zeroinitializer, i16 -1, i32 4"
SCALE = f"""
declare <16 x float> @llvm.x86.avx512.mask.reduce.ps.512(
  <16 x float>, i32, <16 x float>, i16, i32)
declare <16 x float> @llvm.x86.avx512.mask.scalef.ps.512(
  <16 x float>, <16 x float>, <16 x float>, i16, i32)
define linkonce_odr <16 x float> @bertile_fraction(<16 x float> %a) alwaysinline {{
  %r = call <16 x float> @llvm.x86.avx512.mask.reduce.ps.512(<16 x float> %a, i32 1, {_SCALING})
  ret <16 x float> %r
}}
define linkonce_odr <16 x float> @bertile_scale(<16 x float> %a, <16 x float> %b) alwaysinline {{
  %r = call <16 x float> @llvm.x86.avx512.mask.scalef.ps.512(
    <16 x float> %a, <16 x float> %b, {_SCALING})
  ret <16 x float> %r
}}
"""


def _widen(name: str, picked: Sequence[int], extend: str) -> str:
    places = ", ".join(f"i32 {place}" for place in picked)
    return f"""
define linkonce_odr <16 x i32> @{name}(<16 x i32> %a) alwaysinline {{
  %b = bitcast <16 x i32> %a to <64 x i8>
  %p = shufflevector <64 x i8> %b, <64 x i8> poison, <32 x i32> <{places}>
  %w = {extend} <32 x i8> %p to <32 x i16>
  %r = bitcast <32 x i16> %w to <16 x i32>
  ret <16 x i32> %r
}}
"""


WIDEN = "".join(
    _widen(f"bertile_wide{half}", range(32 * half, 32 * half + 32), "sext")
    + _widen(f"bertile_pair{half}", [4 * (i // 2) + i % 2 + 2 * half for i in range(32)], "zext")
    for half in range(2)
)

# Of weights that are bounded, by vpmaddubsw. One register of 512 bits, or two of 256.
_ONES = "splat (i16 1)"
SHORTS = """
define linkonce_odr <16 x i32> @bertile_shorts(<16 x i32> %a, <16 x i32> %b) alwaysinline {
  %x = bitcast <16 x i32> %a to <32 x i16>
  %y = bitcast <16 x i32> %b to <32 x i16>
  %s = add <32 x i16> %x, %y
  %r = bitcast <32 x i16> %s to <16 x i32>
  ret <16 x i32> %r
}
"""
PAIRS_AVX512 = f"""
declare <16 x i32> @llvm.x86.avx512.pmaddw.d.512(<32 x i16>, <32 x i16>)
declare <32 x i16> @llvm.x86.avx512.pmaddubs.w.512(<64 x i8>, <64 x i8>)
define linkonce_odr <16 x i32> @bertile_bytes(<16 x i32> %a, <16 x i32> %b) alwaysinline {{
  %x = bitcast <16 x i32> %a to <64 x i8>
  %y = bitcast <16 x i32> %b to <64 x i8>
  %s = call <32 x i16> @llvm.x86.avx512.pmaddubs.w.512(<64 x i8> %x, <64 x i8> %y)
  %r = bitcast <32 x i16> %s to <16 x i32>
  ret <16 x i32> %r
}}
define linkonce_odr <16 x i32> @bertile_widened(<16 x i32> %c, <16 x i32> %a) alwaysinline {{
  %s = bitcast <16 x i32> %a to <32 x i16>
  %p = call <16 x i32> @llvm.x86.avx512.pmaddw.d.512(<32 x i16> %s, <32 x i16> {_ONES})
  %r = add <16 x i32> %c, %p
  ret <16 x i32> %r
}}
define linkonce_odr <16 x i32> @bertile_pairs(<16 x i32> %c, <16 x i32> %a, <16 x i32> %b)
    alwaysinline {{
  %x = bitcast <16 x i32> %a to <32 x i16>
  %y = bitcast <16 x i32> %b to <32 x i16>
  %p = call <16 x i32> @llvm.x86.avx512.pmaddw.d.512(<32 x i16> %x, <32 x i16> %y)
  %r = add <16 x i32> %c, %p
  ret <16 x i32> %r
}}
define linkonce_odr <16 x i32> @bertile_dot4(<16 x i32> %c, <16 x i32> %a, <16 x i32> %b)
    alwaysinline {{
  %x = bitcast <16 x i32> %a to <64 x i8>
  %y = bitcast <16 x i32> %b to <64 x i8>
  %s = call <32 x i16> @llvm.x86.avx512.pmaddubs.w.512(<64 x i8> %x, <64 x i8> %y)
  %p = call <16 x i32> @llvm.x86.avx512.pmaddw.d.512(<32 x i16> %s, <32 x i16> {_ONES})
  %r = add <16 x i32> %c, %p
  ret <16 x i32> %r
}}
{SHORTS}{WIDEN}"""


def _counted(count: int, first: int = 0) -> str:
    return ", ".join(f"i32 {first + i}" for i in range(count))


def _halves(name: str, form: str, count: int) -> str:
    return "".join(
        f"  %{name}{part} = shufflevector {form} %{name}, {form} poison, "
        f"<{count} x i32> <{_counted(count, count * part)}>\n"
        for part in range(2)
    )


_ADDED = f"""  %p = shufflevector <8 x i32> %p0, <8 x i32> %p1, <16 x i32> <{_counted(16)}>
  %r = add <16 x i32> %c, %p
  ret <16 x i32> %r
"""
PAIRS_AVX2 = f"""
declare <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16>, <16 x i16>)
declare <16 x i16> @llvm.x86.avx2.pmadd.ub.sw(<32 x i8>, <32 x i8>)
define linkonce_odr <16 x i32> @bertile_bytes(<16 x i32> %a, <16 x i32> %b) alwaysinline {{
  %x = bitcast <16 x i32> %a to <64 x i8>
  %y = bitcast <16 x i32> %b to <64 x i8>
{_halves("x", "<64 x i8>", 32)}{_halves("y", "<64 x i8>", 32)}\
  %s0 = call <16 x i16> @llvm.x86.avx2.pmadd.ub.sw(<32 x i8> %x0, <32 x i8> %y0)
  %s1 = call <16 x i16> @llvm.x86.avx2.pmadd.ub.sw(<32 x i8> %x1, <32 x i8> %y1)
  %s = shufflevector <16 x i16> %s0, <16 x i16> %s1, <32 x i32> <{_counted(32)}>
  %r = bitcast <32 x i16> %s to <16 x i32>
  ret <16 x i32> %r
}}
define linkonce_odr <16 x i32> @bertile_widened(<16 x i32> %c, <16 x i32> %a) alwaysinline {{
  %s = bitcast <16 x i32> %a to <32 x i16>
{_halves("s", "<32 x i16>", 16)}\
  %p0 = call <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16> %s0, <16 x i16> {_ONES})
  %p1 = call <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16> %s1, <16 x i16> {_ONES})
{_ADDED}}}
define linkonce_odr <16 x i32> @bertile_pairs(<16 x i32> %c, <16 x i32> %a, <16 x i32> %b)
    alwaysinline {{
  %x = bitcast <16 x i32> %a to <32 x i16>
  %y = bitcast <16 x i32> %b to <32 x i16>
{_halves("x", "<32 x i16>", 16)}{_halves("y", "<32 x i16>", 16)}\
  %p0 = call <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16> %x0, <16 x i16> %y0)
  %p1 = call <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16> %x1, <16 x i16> %y1)
{_ADDED}}}
define linkonce_odr <16 x i32> @bertile_dot4(<16 x i32> %c, <16 x i32> %a, <16 x i32> %b)
    alwaysinline {{
  %x = bitcast <16 x i32> %a to <64 x i8>
  %y = bitcast <16 x i32> %b to <64 x i8>
{_halves("x", "<64 x i8>", 32)}{_halves("y", "<64 x i8>", 32)}\
  %s0 = call <16 x i16> @llvm.x86.avx2.pmadd.ub.sw(<32 x i8> %x0, <32 x i8> %y0)
  %s1 = call <16 x i16> @llvm.x86.avx2.pmadd.ub.sw(<32 x i8> %x1, <32 x i8> %y1)
  %p0 = call <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16> %s0, <16 x i16> {_ONES})
  %p1 = call <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16> %s1, <16 x i16> {_ONES})
{_ADDED}}}
{SHORTS}{WIDEN}"""
