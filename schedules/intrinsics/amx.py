"""Writes the tile instructions of x86 (AMX) as lines of LLVM IR that a kernel links and inlines.

A tile is 16 rows of 64 bytes. Tiles 0 to 3 are sums, 4 and 5 weights, 6 and 7 inputs.

    bertile_tiles_open()           all eight tiles at full size; to be said before any other
    bertile_tiles_close()          give them up, so that no thread is switched with them
    bertile_tile_zero0()           sums from nothing, and so for 1 to 3
    bertile_tile_load4(p, bytes)   rows that lie so far apart, into a tile from 4 on
    bertile_tile_store0(p, bytes)  sums to memory
    bertile_tile_dot4_0_4_6()      0 += 4 × 6, signed bytes by unsigned ones; dot2 of bfloat16

    bertile_turn16(from, to)       16 rows of 16 lanes, turned: lane i of row j is lane j of row i;
                                   of fewer rows the others are zero

    bertile_nibbles1(from, m, to)  two rows of 64 bytes from 64 bytes of nibbles, each times an
                                   eighth of its row's multiplier of 16 bits; nibbles2 of each half

Linux gives a process tiles when it asks (``arch_prctl``), for good: the first kernel that opens
them does so.
"""

from __future__ import annotations

from collections.abc import Iterable

SUMS, WEIGHTS, INPUTS = range(4), range(4, 6), range(6, 8)
ROWS, BYTES = 16, 64  # of a tile

_OPEN = """
declare void @llvm.x86.ldtilecfg(ptr)
declare void @llvm.x86.tilerelease()
declare void @llvm.x86.tilezero(i8)
declare void @llvm.x86.tileloadd64(i8, ptr, i64)
declare void @llvm.x86.tilestored64(i8, ptr, i64)
declare void @llvm.x86.tdpbsud(i8, i8, i8)
declare void @llvm.x86.tdpbf16ps(i8, i8, i8)
@bertile_has_tiles = linkonce_odr global i32 0, align 4
define linkonce_odr i32 @bertile_tiles_open() alwaysinline {
  %has = load atomic i32, ptr @bertile_has_tiles monotonic, align 4
  %asked = icmp ne i32 %has, 0
  br i1 %asked, label %open, label %ask
ask:
  %r = call i64 asm sideeffect "syscall",
    "={rax},{rax},{rdi},{rsi},~{rcx},~{r11},~{memory}"(i64 158, i64 4131, i64 18)
  store atomic i32 1, ptr @bertile_has_tiles monotonic, align 4
  br label %open
open:
  call void @llvm.x86.ldtilecfg(ptr @bertile_tile_sizes)
  ret i32 0
}
"""


def _function(name: str, call: str, arguments: str = "") -> str:
    return f"""
define linkonce_odr i32 @bertile_{name}({arguments}) alwaysinline {{
  call void @llvm.x86.{call}
  ret i32 0
}}
"""


def _config() -> str:
    # palette 1, no restart, 14 reserved; 16 times bytes of a row, 16 times rows
    sizes = [BYTES] * 8 + [0] * 8
    numbers = [1, *[0] * 15, *(b for size in sizes for b in (size, 0))]
    numbers += [ROWS] * 8 + [0] * 8
    values = ", ".join(f"i8 {number}" for number in numbers)
    return f"@bertile_tile_sizes = linkonce_odr constant [64 x i8] [{values}], align 64\n"


TILES = "".join(
    [
        _config(),
        _OPEN,
        _function("tiles_close", "tilerelease()"),
        *(_function(f"tile_zero{c}", f"tilezero(i8 {c})") for c in SUMS),
        *(
            _function(f"tile_load{i}", f"tileloadd64(i8 {i}, ptr %p, i64 %s)", "ptr %p, i64 %s")
            for i in (*WEIGHTS, *INPUTS)
        ),
        *(
            _function(f"tile_store{c}", f"tilestored64(i8 {c}, ptr %p, i64 %s)", "ptr %p, i64 %s")
            for c in SUMS
        ),
        *(
            _function(f"tile_{name}_{c}_{a}_{b}", f"{instruction}(i8 {c}, i8 {a}, i8 {b})")
            for name, instruction in (("dot4", "tdpbsud"), ("dot2", "tdpbf16ps"))
            for c in SUMS
            for a in WEIGHTS
            for b in INPUTS
        ),
    ]
)


def nibbles(halves: int) -> str:
    """The function that unpacks nibbles with so many multipliers a row.

    16 bits of the source are two neighbours of the first row, then two of the second: shifted to
    the upper end of their 16 bits they are 4096 times as much, of which a rounded product of the
    upper halves keeps an eighth of level × multiplier.
    """
    words, upper, lower = "<32 x i16>", "splat (i16 -4096)", "splat (i16 255)"
    lines = [f"%v = load {words}, ptr %from, align 64"]
    for place, distance in enumerate((12, 8, 4, 0)):
        lines.append(f"%s{place} = shl {words} %v, splat (i16 {distance})")
        lines.append(f"%n{place} = and {words} %s{place}, {upper}")
    for row in range(2):
        for half in range(halves):
            name, at = f"{row}{half}", row * halves + half
            lines.append(f"%p{name} = getelementptr i16, ptr %m, i64 {at}")
            lines.append(f"%x{name} = load i16, ptr %p{name}, align 2")
            lines.append(f"%e{name} = insertelement {words} poison, i16 %x{name}, i64 0")
        picked = ", ".join(f"i32 {32 * (lane * halves // 32)}" for lane in range(32))
        other = f"%e{row}{halves - 1}"
        mask = f"<32 x i32> <{picked}>"
        lines.append(f"%m{row} = shufflevector {words} %e{row}0, {words} {other}, {mask}")
        for odd in range(2):
            place = 2 * row + odd
            call = f"call {words} @{_ROUNDED}({words} %n{place}, {words} %m{row})"
            lines.append(f"%r{place} = {call}")
        lines.append(f"%l{row} = and {words} %r{2 * row}, {lower}")
        lines.append(f"%h{row} = shl {words} %r{2 * row + 1}, splat (i16 8)")
        lines.append(f"%b{row} = or {words} %l{row}, %h{row}")
        lines.append(f"%t{row} = getelementptr i8, ptr %to, i64 {BYTES * row}")
        lines.append(f"store {words} %b{row}, ptr %t{row}, align 64")
    body = "".join(f"  {line}\n" for line in lines)
    head = f"define linkonce_odr i32 @bertile_nibbles{halves}(ptr %from, ptr %m, ptr %to)"
    declared = f"\ndeclare {words} @{_ROUNDED}({words}, {words})\n"
    return f"{declared}{head} alwaysinline {{\n{body}  ret i32 0\n}}\n"


_ROUNDED = "llvm.x86.avx512.pmul.hr.sw.512"


def turned(rows: Iterable[int]) -> str:
    """The functions that turn so many rows each."""
    return "".join(map(_turned, sorted(set(rows))))


def _turned(rows: int) -> str:
    """Blocks of 1, 2, 4 and 8 lanes change places with those of the row that far away."""
    vector, lines = "<16 x i32>", []
    for i in range(rows):
        lines.append(f"%a{i} = getelementptr i8, ptr %from, i64 {BYTES * i}")
        lines.append(f"%v0_{i} = load {vector}, ptr %a{i}, align 64")
    names = [f"%v0_{i}" if i < rows else "zeroinitializer" for i in range(ROWS)]
    for stage, far in enumerate((1, 2, 4, 8), 1):
        for i in range(ROWS):
            if i & far:
                continue
            low, high = names[i], names[i + far]
            first = [j if not j & far else 16 + j - far for j in range(ROWS)]
            second = [j + far if not j & far else 16 + j for j in range(ROWS)]
            for place, picked in ((i, first), (i + far, second)):
                mask = ", ".join(f"i32 {lane}" for lane in picked)
                names[place] = f"%v{stage}_{place}"
                lines.append(
                    f"{names[place]} = shufflevector {vector} {low}, {vector} {high},"
                    f" {vector} <{mask}>"
                )
    for i in range(ROWS):
        lines.append(f"%b{i} = getelementptr i8, ptr %to, i64 {BYTES * i}")
        lines.append(f"store {vector} {names[i]}, ptr %b{i}, align 64")
    body = "".join(f"  {line}\n" for line in lines)
    head = f"define linkonce_odr i32 @bertile_turn{rows}(ptr %from, ptr %to)"
    return f"\n{head} alwaysinline {{\n{body}  ret i32 0\n}}\n"
