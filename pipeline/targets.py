"""The machines that Bertile compiles for: one row each, and the way from a name to a row."""

from __future__ import annotations

import dataclasses
import platform
import shutil
import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from importlib import util
from typing import TYPE_CHECKING, Any

from bertile.errors import PlatformError, UsageError, nearest
from bertile.loader import available_cores, cpu_features
from bertile.tables import table

if TYPE_CHECKING:
    import tvm


@dataclass(frozen=True)
class Target:
    """What schedules, tuner, builder and loader may ask about a machine.

    `tvm` is the TVM target without "num-cores"; `features` are the CPU features that its code may
    use, as /proc/cpuinfo spells them; `log` names the row whose tuning log this one reads and
    writes; `triple` is the target of a cross linker; `threads` is what `resolve` found or was told.
    """

    name: str
    arch: str
    tvm: dict[str, Any] = field(hash=False)
    vector_bits: int
    registers: int
    features: tuple[str, ...]
    log: str
    dot_product: str | None = None
    bf16: bool = False
    lanes: int = 16
    triple: str = "x86_64-linux-gnu.2.28"
    threads: int = 1


# x86-64-v3 and -v4 are LLVM's names for exactly these features; a named processor (znver4,
# cascadelake) would let LLVM use others (sha, pku, vbmi) that the next processor may lack.
_V3 = ("ssse3", "sse4_1", "sse4_2", "cx16", "popcnt", "movbe", "bmi1", "bmi2", "abm", "f16c", "fma")
_V3 += ("avx", "avx2")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")


def _avx512(*extra: str) -> dict[str, Any]:
    # LLVM's x86-64-v4 prefers 256-bit vectors where it vectorizes by itself (LayerNorm tails,
    # copies): half the width for fear of a clock drop that today's processors no longer have.
    return {"kind": "llvm", "mcpu": "x86-64-v4", "mattr": ["-prefer-256-bit", *extra]}


# fp32 code is the same on every AVX-512 row, hence one log for all of them.
# Order: `native` takes the first row whose features this processor has.
TABLE: tuple[Target, ...] = (
    Target(
        name="x86-avx512-bf16",
        arch="x86_64",
        tvm=_avx512("+avx512vnni", "+avx512bf16"),
        vector_bits=512,
        registers=32,
        features=(*_V4, "avx512_vnni", "avx512_bf16"),
        log="x86-avx512",
        dot_product="vnni",
        bf16=True,
    ),
    Target(
        name="x86-avx512-vnni",
        arch="x86_64",
        tvm=_avx512("+avx512vnni"),
        vector_bits=512,
        registers=32,
        features=(*_V4, "avx512_vnni"),
        log="x86-avx512",
        dot_product="vnni",
    ),
    Target(
        name="x86-avx512",
        arch="x86_64",
        tvm=_avx512(),
        vector_bits=512,
        registers=32,
        features=_V4,
        log="x86-avx512",
    ),
    Target(
        name="x86-avx2",
        arch="x86_64",
        tvm={"kind": "llvm", "mcpu": "x86-64-v3"},
        vector_bits=256,
        registers=16,
        features=_V3,
        log="x86-avx2",
    ),
)


def names() -> tuple[str, ...]:
    """The names of the rows, as a user may type them beside `native`."""
    return tuple(row.name for row in TABLE)


def resolve(name: str = "native", threads: int | None = None) -> Target:
    """The row of that name with its number of threads (None: the cores this process may use).

    `native` is the best row for this processor. UsageError for an unknown name, PlatformError
    where no row fits this processor.
    """
    row = native() if name == "native" else _row(name)
    return dataclasses.replace(row, threads=threads or available_cores())


def native(features: Collection[str] | None = None, arch: str | None = None) -> Target:
    """The first row whose features are all in `features` (default: this processor's)."""
    arch = arch or platform.machine()
    found = cpu_features() if features is None else frozenset(features)
    for row in TABLE:
        if fits(row, found, arch):
            return row
    least = TABLE[-1]
    lacks = [one for one in least.features if one not in found]
    reason = f"lacks {' '.join(lacks)}" if arch == least.arch else f"is {arch}"
    raise PlatformError(
        f"no target fits this machine: it {reason}", f"name a target: {', '.join(names())}"
    )


def fits(row: Target, features: Collection[str], arch: str | None = None) -> bool:
    """Whether a processor of that architecture (default: this one's) can run the row's code."""
    return row.arch == (arch or platform.machine()) and set(features).issuperset(row.features)


def as_text(runs: Collection[str], best: str | None) -> str:
    """A table of all rows; `runs` are the names of those for this machine, `best` its native."""
    header = ("target", "arch", "vector bits", "registers", "dot product", "bf16", "runs here")
    rows = [
        (
            row.name,
            row.arch,
            row.vector_bits,
            row.registers,
            row.dot_product,
            "yes" if row.bf16 else None,
            "native" if row.name == best else "yes" if row.name in runs else "no",
        )
        for row in TABLE
    ]
    return table(header, rows)


def _row(name: str) -> Target:
    for row in TABLE:
        if row.name == name:
            return row
    raise UsageError(f"target '{name}' is unknown{nearest(name, ('native', *names()))}")


def tvm_target(row: Target, threads: int | None = None) -> tvm.target.Target:
    """TVM's own form of the row; "num-cores" is what its tuner plans parallel loops for."""
    import tvm

    return tvm.target.Target({**row.tvm, "num-cores": threads or row.threads})


def link_command(row: Target) -> list[str]:
    """The command that links a shared library for `row`: the host's `cc`, else pip's ziglang."""
    if row.arch == platform.machine() and (cc := shutil.which("cc") or shutil.which("gcc")):
        return [cc]
    if util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc", "-target", row.triple]
    raise PlatformError(
        f"no linker for {row.arch} was found", "install a C compiler, or: pip install ziglang"
    )
