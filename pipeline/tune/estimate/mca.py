"""Stretches of assembly come in; the cycles that a processor takes for each, by llvm-mca's model of
it, go out.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from bertile.base.errors import BertileError, PlatformError, UsageError

VERSIONS = (19, 20, 21, 22)
INSTALL = "install it with: apt-get install llvm-19"
ITERATIONS = 100  # of a stretch, one behind the other, of which the average is taken
SECONDS = 120.0


@dataclass(frozen=True)
class Cache:
    """A cache as one core has it, and the core's cycles for a line that is fetched into it."""

    size: int
    cycles: float


@dataclass(frozen=True)
class Model:
    """How LLVM describes a processor's pipelines, and what it does not say of the processor.

    `since` is the first LLVM whose description can be relied on, `gigahertz` the clock that turns
    cycles into time: what such processors run at when all cores work. `caches` come nearest first,
    the last of three being a few cores' share of what all have: the nearest fetches by the widths
    that manuals give, the last a core's usual share of the memory, one between at a third of the
    nearest's speed, as was measured on Zen 4 by ``studies.mca_rank``.
    `reads` are instructions that LLVM describes wrongly, as patterns, and what to read instead.
    """

    triple: str
    processor: str
    gigahertz: float
    caches: tuple[Cache, ...]
    since: int = 19
    reads: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Stretch:
    """What llvm-mca says of one stretch of code: instructions, and cycles where it is repeated."""

    instructions: int
    cycles: float


KB = 1 << 10
# LLVM 19 has a broadcast from memory take a shuffle's place too, and the dot products of
# registers two or three cycles of their unit, where those with memory take one, as both do.
_ZEN4_READS = (
    (r"\bvp?broadcast(?:ss|d)\s+([^%\s]*\(.*\)), (%[yz]mm)", r"vmovups \1, \2"),
    (r"\bv(?:pdpbusd|dpbf16ps)\s+(%[xyz]mm)", r"vfmadd231ps \1"),
)
_ZEN = (Cache(32 * KB, 2), Cache(1024 * KB, 6), Cache(4096 * KB, 12))
_ZEN4 = Model("x86_64", "znver4", 3.7, _ZEN, reads=_ZEN4_READS)
_ZEN3 = Model("x86_64", "znver3", 3.4, (_ZEN[0], Cache(512 * KB, 6), _ZEN[2]))
# its tiles are not described, so that what multiplies by them is estimated too fast
_AMX = Model("x86_64", "sapphirerapids", 3.0, (Cache(48 * KB, 2), Cache(2048 * KB, 8)), reads=())
_A72 = Model(
    "aarch64-linux-gnu", "cortex-a72", 1.8, (Cache(32 * KB, 4), Cache(512 * KB, 38)), since=14
)


def _neoverse(
    core: str, gigahertz: float, sizes: tuple[int, int], cycles: tuple[float, float]
) -> Model:
    """KB of the L2 cache and of what four cores share; cycles of a line from L2 and from memory."""
    (second, third), (near, memory) = sizes, cycles
    caches = (Cache(64 * KB, near), Cache(second * KB, 3 * near), Cache(third * KB, memory))
    return Model("aarch64-linux-gnu", f"neoverse-{core}", gigahertz, caches)


# The processor that stands for a row. A Cortex-A76 is a Neoverse N1 but for its caches, and LLVM
# describes the N1 better (as an A76 it takes a Cortex-A57).
MODELS = {
    "x86-amx": _AMX,
    "x86-avx512-bf16": _ZEN4,
    "x86-avx512-vnni": _ZEN4,
    "x86-avx512": _ZEN4,
    "x86-avx2": _ZEN3,
    "arm-a72": _A72,
    "arm-a76": _neoverse("n1", 2.4, (512, 2048), (2, 19)),
    "arm-v1": _neoverse("v1", 2.6, (1024, 2048), (1, 14)),
    "arm-v2": _neoverse("v2", 2.8, (2048, 4096), (1, 11)),
}


def model_of(row: Any) -> Model:
    """The model for a row; UsageError where no processor stands for it."""
    same = [model for model in MODELS.values() if model.processor == row.tvm["mcpu"]]
    if model := MODELS.get(row.name) or next(iter(same), None):
        return model
    known = ", ".join(MODELS)
    raise UsageError(f"llvm-mca's times are not known for '{row.name}'", f"known: {known}")


def tool(model: Model) -> str:
    """The llvm-mca on the PATH that knows the model; PlatformError where there is none."""
    names = [*(f"llvm-mca-{version}" for version in VERSIONS), "llvm-mca"]
    versions = {path: _version(path) for name in names if (path := shutil.which(name))}
    for path, version in versions.items():
        if version >= model.since:
            return path
    have = f"is of LLVM {max(versions.values())}" if versions else "was not found"
    wants = f"the model of {model.processor} wants LLVM {model.since}"
    raise PlatformError(f"llvm-mca {have}; {wants}", INSTALL)


def analyse(stretches: Sequence[Sequence[str]], model: Model) -> list[Stretch]:
    """What each list of instructions takes, again and again; operands in the first-level cache."""
    lines = [
        line
        for number, instructions in enumerate(stretches)
        for line in _region(number, instructions)
    ]
    for pattern, instead in model.reads:
        lines = [re.sub(pattern, instead, line) for line in lines]
    command = [tool(model), f"-mtriple={model.triple}", f"-mcpu={model.processor}"]
    command += [f"-iterations={ITERATIONS}", "-json"]
    command += ["-instruction-info=false", "-resource-pressure=false"]
    try:
        run = subprocess.run(
            command, input="\n".join(lines) + "\n", capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        raise BertileError(f"llvm-mca did not end within {SECONDS:.0f} s") from None
    if run.returncode:
        reason = next((line for line in run.stderr.splitlines() if "error" in line), run.stderr)
        raise BertileError(f"llvm-mca cannot read the kernel: {reason.strip()[-200:]}")
    regions = {int(region["Name"]): region for region in json.loads(run.stdout)["CodeRegions"]}
    return [_stretch(regions.get(number)) for number in range(len(stretches))]


def _region(number: int, instructions: Sequence[str]) -> list[str]:
    return [f"# LLVM-MCA-BEGIN {number}", *instructions, f"# LLVM-MCA-END {number}"]


def _stretch(region: Any) -> Stretch:
    if region is None:  # nothing in it
        return Stretch(0, 0.0)
    view = region["SummaryView"]
    count = view["Iterations"]
    return Stretch(view["Instructions"] // count, view["TotalCycles"] / count)


@lru_cache
def _version(path: str) -> int:
    text = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    match = re.search(r"LLVM version (\d+)", text)
    return int(match[1]) if match else 0
