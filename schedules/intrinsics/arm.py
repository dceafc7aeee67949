"""Writes ARM instructions that TVM cannot name as lines of LLVM IR that a kernel links and inlines.

Operands are vectors of 16 lanes of 32 bits, in four registers, whatever the lanes hold.

    bertile_dot4(c, a, b)      c + Σ a[i] b[i], four bytes by four signed ones, exact
    bertile_dot2(c, a, b)      c + a[0] b[0] + a[1] b[1], two bfloat16 each, into float32
    bertile_signed(a)          unsigned bytes less 128, which are signed, in the order of dot4's a
    bertile_matrix4(c, a, b)   c + a b for bytes, unsigned by signed, b of four lanes: a register of
                               a is two tokens of two lanes, b is two outputs of two lanes, one of c
                               is two tokens of two outputs
    bertile_matrix2(c, a, b)   the same for bfloat16
    bertile_zip0(a, b), zip1   lanes a[0] b[0] a[1] b[1] …, the first and the second half of them
    bertile_lane0of4(a) to 3   one of four lanes everywhere; lane0of2 and lane1of2 of two
    bertile_halves4(a), 2      so many float16 as float32
    bertile_even(a, b), odd    every second lane of a, then of b: what takes zips apart again

sdot and plain NEON multiply signed bytes by signed ones: their kernels take 128 from x and add 128
times the sum of the weights, to the same integers as elsewhere. usdot and usmmla take x as it is.
"""

from __future__ import annotations

from collections.abc import Iterable

WIDE, FOUR = "<16 x i32>", "<4 x i32>"


def _mask(places: Iterable[int]) -> str:
    numbers = [f"i32 {place}" for place in places]
    return f"<{len(numbers)} x i32> <{', '.join(numbers)}>"


def _by_register(name: str, total: str, b: str, lines: Iterable[str]) -> str:
    """A function that does ``lines`` on %c#, %a# and %b# of each register, to %r#; ``b`` is WIDE,
    or FOUR that all registers meet.
    """
    body = []
    for quarter in range(4):
        mask = _mask(range(4 * quarter, 4 * quarter + 4))
        for operand, kind in (("c", f"<16 x {total}>"), ("a", WIDE), ("b", b)):
            picked = _mask(range(4)) if kind == FOUR else mask
            body.append(f"%{operand}# = shufflevector {kind} %{operand}, {kind} poison, {picked}")
        body += lines
        body = [line.replace("#", str(quarter)) for line in body]
    four, eight = f"<4 x {total}>", f"<8 x {total}>"
    body += [
        f"%h0 = shufflevector {four} %r0, {four} %r1, {_mask(range(8))}",
        f"%h1 = shufflevector {four} %r2, {four} %r3, {_mask(range(8))}",
        f"%r = shufflevector {eight} %h0, {eight} %h1, {_mask(range(16))}",
        f"ret <16 x {total}> %r",
    ]
    text = "".join(f"  {line}\n" for line in body)
    head = f"define linkonce_odr <16 x {total}> @{name}(<16 x {total}> %c, {WIDE} %a, {b} %b)"
    return f"\n{head} alwaysinline {{\n{text}}}\n"


def _instruction(name: str, total: str, operand: str, intrinsic: str, b: str = WIDE) -> str:
    """A function that is one instruction on each register."""
    four = f"<4 x {total}>"
    lines = [
        f"%x# = bitcast {FOUR} %a# to {operand}",
        f"%y# = bitcast {FOUR} %b# to {operand}",
        f"%r# = call {four} @{intrinsic}({four} %c#, {operand} %x#, {operand} %y#)",
    ]
    declared = f"\ndeclare {four} @{intrinsic}({four}, {operand}, {operand})\n"
    return declared + _by_register(name, total, b, lines)


def _shuffle(name: str, places: Iterable[int]) -> str:
    return f"""
define linkonce_odr {WIDE} @{name}({WIDE} %a, {WIDE} %b) alwaysinline {{
  %r = shufflevector {WIDE} %a, {WIDE} %b, {_mask(places)}
  ret {WIDE} %r
}}
"""


SHUFFLES = "".join(
    [
        _shuffle("bertile_zip0", (i // 2 + i % 2 * 16 for i in range(16))),
        _shuffle("bertile_zip1", (i // 2 + i % 2 * 16 for i in range(16, 32))),
        _shuffle("bertile_even", range(0, 32, 2)),
        _shuffle("bertile_odd", range(1, 32, 2)),
    ]
)

_BYTES, _HALVES = "<16 x i8>", "<8 x bfloat>"
_NEON = "llvm.aarch64.neon"

DOT4_SDOT = _instruction("bertile_dot4", "i32", _BYTES, f"{_NEON}.sdot.v4i32.v16i8")
DOT4_USDOT = _instruction("bertile_dot4", "i32", _BYTES, f"{_NEON}.usdot.v4i32.v16i8")
DOT2_BF16 = _instruction("bertile_dot2", "float", _HALVES, f"{_NEON}.bfdot.v4f32.v8bf16")
MATRIX_INT8 = _instruction("bertile_matrix4", "i32", _BYTES, f"{_NEON}.usmmla.v4i32.v16i8", FOUR)
MATRIX_BF16 = _instruction("bertile_matrix2", "float", _HALVES, f"{_NEON}.bfmmla", FOUR)


_HIGHEST_BITS = f"splat (i32 {0x80808080 - (1 << 32)})"

SIGNED = f"""
define linkonce_odr {WIDE} @bertile_signed({WIDE} %a) alwaysinline {{
  %r = xor {WIDE} %a, {_HIGHEST_BITS}
  ret {WIDE} %r
}}
"""

# In each register bytes 0 and 1 of its four tokens come first, then bytes 2 and 3.
SIGNED_NEON = f"""
define linkonce_odr {WIDE} @bertile_signed({WIDE} %a) alwaysinline {{
  %s = xor {WIDE} %a, {_HIGHEST_BITS}
  %h = bitcast {WIDE} %s to <32 x i16>
  %o = shufflevector <32 x i16> %h, <32 x i16> poison,
    {_mask(i // 8 * 8 + i % 4 * 2 + i % 8 // 4 for i in range(32))}
  %r = bitcast <32 x i16> %o to {WIDE}
  ret {WIDE} %r
}}
"""


def _lane(place: int, count: int) -> str:
    return f"""
define linkonce_odr {WIDE} @bertile_lane{place}of{count}(<{count} x i32> %a) alwaysinline {{
  %r = shufflevector <{count} x i32> %a, <{count} x i32> poison, {_mask([place] * 16)}
  ret {WIDE} %r
}}
"""


# By lane of a register, weights cost a load in four; broadcast from memory, each takes a place of a
# multiply-add too.
LANES = "".join(_lane(place, count) for count in (2, 4) for place in range(count))

HALVES = "".join(
    f"""
define linkonce_odr <{count} x i32> @bertile_halves{count}(<{count} x i16> %a) alwaysinline {{
  %h = bitcast <{count} x i16> %a to <{count} x half>
  %f = fpext <{count} x half> %h to <{count} x float>
  %r = bitcast <{count} x float> %f to <{count} x i32>
  ret <{count} x i32> %r
}}
"""
    for count in (2, 4)
)


def _neon() -> str:
    """Products of a register's halves, each of two bytes of four tokens (``SIGNED_NEON``)."""
    halves = "<8 x i16>"
    lines = [f"%x# = bitcast {FOUR} %a# to {_BYTES}", f"%y# = bitcast {FOUR} %b# to {halves}"]
    for half, total in enumerate(("%c#", "%t#")):
        half_of_x = _mask(range(8 * half, 8 * half + 8))
        lines += [
            f"%x{half}# = shufflevector {_BYTES} %x#, {_BYTES} poison, {half_of_x}",
            f"%w{half}# = shufflevector {halves} %y#, {halves} poison, {_mask([half] * 4)}",
            f"%y{half}# = bitcast <4 x i16> %w{half}# to <8 x i8>",
            f"%p{half}# = call {halves} @{_NEON}.smull.v8i16("
            f"<8 x i8> %x{half}#, <8 x i8> %y{half}#)",
            f"%s{half}# = call {FOUR} @{_NEON}.saddlp.v4i32.v8i16({halves} %p{half}#)",
            f"%{'tr'[half]}# = add {FOUR} {total}, %s{half}#",
        ]
    return f"""
declare {halves} @{_NEON}.smull.v8i16(<8 x i8>, <8 x i8>)
declare {FOUR} @{_NEON}.saddlp.v4i32.v8i16({halves})
{_by_register("bertile_dot4", "i32", WIDE, lines)}"""


DOT4_NEON = _neon()
