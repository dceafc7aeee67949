"""Lists the machines that Bertile compiles for, one row each, and finds a row by its name."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bertile.base.errors import PlatformError, UsageError, nearest
from bertile.loader import available_cores, cpu_features
from bertile.schedules import BLOCK_TOKENS
from bertile.schedules.schedule import Gpu

if TYPE_CHECKING:
    import tvm


USUAL, LONG = 512, 2048  # tokens that most models take; what others are measured on too
TRIAL_BLOCKS = 8  # a trial runs on 128 tokens, the length that most requests are near to, first


@dataclass(frozen=True)
class Target:
    """What schedules, tuner, builder and loader may ask about a machine.

    `tvm` is the TVM target without "num-cores"; `tiles` are those of AMX; `features` are the CPU
    features that its code may use, as /proc/cpuinfo spells them; `log` names the row whose tuning
    log this one reads and writes; `triple` is the target of a cross linker; `threads` is what
    `resolve` found or was told.
    A row with a `gpu` has no code for a processor: its bundles are the same for every one.
    """

    name: str
    arch: str  # as platform.machine() says it, or "cuda"
    tvm: dict[str, Any] = field(hash=False)
    vector_bits: int
    registers: int
    features: tuple[str, ...]
    log: str
    dot_product: str | None = None
    bf16: bool = False
    tiles: bool = False
    triple: str = "x86_64-linux-gnu.2.28"
    threads: int = 1
    gpu: Gpu | None = None
    # Numbers of tokens that a search measures a kernel on, and how much each counts: one kernel
    # serves all. Most requests are near 128.
    mix: tuple[tuple[int, float], ...] = ((16, 1.0), (128, 2.0), (384, 1.0))
    kernels_are_text: bool = False  # which TVM has no part in

    @property
    def also_blocks(self) -> tuple[int, ...]:
        """On how many blocks of tokens a trial runs, beside the usual number."""
        counts = (-(-tokens // BLOCK_TOKENS) for tokens, _ in self.mix)
        return tuple(count for count in counts if count != TRIAL_BLOCKS)


# x86-64-v3 and -v4 are LLVM's names for exactly these features; a named processor (znver4,
# cascadelake) would let LLVM use others (sha, pku, vbmi) that the next processor may lack.
_V3 = ("ssse3", "sse4_1", "sse4_2", "cx16", "popcnt", "movbe", "bmi1", "bmi2", "abm", "f16c", "fma")
_V3 += ("avx", "avx2")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")


def _avx512(*extra: str) -> dict[str, Any]:
    # LLVM's x86-64-v4 prefers 256-bit vectors where it vectorizes by itself (LayerNorm tails,
    # copies): half the width for fear of a clock drop that today's processors no longer have.
    return {"kind": "llvm", "mcpu": "x86-64-v4", "mattr": ["-prefer-256-bit", *extra]}


GENERIC = "aarch64"  # with a processor's name behind it, any that LLVM knows: aarch64-cortex-a55
# What LLVM calls the features that ARM rows have or lack, by their names in /proc/cpuinfo.
ARM_FEATURES = {
    "asimd": "neon",
    "asimdhp": "fullfp16",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
    "sve2": "sve2",
}
# What LLVM would use by itself where a processor has it, and no row needs.
_ARM_OTHERS = ("aes", "sha2", "crc", "lse", "rdm", "rcpc", "complxnum", "jsconv")


def _arm(name: str, processor: str, *features: str) -> Target:
    """The row of an ARM processor: its schedule of instructions, and of its features these."""
    known = [llvm for name, llvm in ARM_FEATURES.items() if name not in features]
    return Target(
        name=name,
        arch="aarch64",
        tvm={
            "kind": "llvm",
            "mtriple": "aarch64-linux-gnu",
            "mcpu": processor,
            "mattr": [f"-{feature}" for feature in (*known, *_ARM_OTHERS)],
        },
        vector_bits=128,
        registers=32,
        features=features,
        log=name,
        dot_product="usmmla" if "i8mm" in features else "sdot" if "asimddp" in features else None,
        bf16="bf16" in features,
        triple="aarch64-linux-gnu.2.28",
    )


def _cuda(capability: int, shared_per_block: int, multiprocessors: int, **facts: Any) -> Target:
    """The row of the NVIDIA GPUs of a compute capability; `multiprocessors` of a typical card.

    CUDA C++ Programming Guide, "Technical Specifications per Compute Capability". A multiprocessor
    has a KiB of shared memory more than one block may take, from 8.0 on.
    """
    name = f"cuda-sm{capability}"
    gpu = Gpu(
        capability=capability,
        shared_per_block=shared_per_block,
        shared_per_sm=shared_per_block + (1024 if capability >= 80 else 0),
        multiprocessors=multiprocessors,
        bf16=capability >= 80,
        async_copy=capability >= 80,
        wgmma=capability == 90,
        **facts,
    )
    return Target(
        name=name,
        arch="cuda",
        tvm={"kind": "cuda", "arch": f"sm_{capability}"},
        vector_bits=128,  # what a thread reads at once
        registers=255,  # of a thread
        features=(f"sm_{capability}",),
        log=name,
        dot_product="mma",
        bf16=gpu.bf16,
        triple="",
        gpu=gpu,
        # of 128 tokens, 8 and 32 sequences too: what a GPU is asked for at once
        mix=((128, 1.0), (1024, 1.0), (4096, 1.0)),
        kernels_are_text=True,
    )


# fp32 code is the same on every AVX-512 row, hence one log for all of them.
# Order: `native` takes the first row whose features this processor has.
TABLE: tuple[Target, ...] = (
    Target(
        name="x86-amx",
        arch="x86_64",
        tvm=_avx512("+avx512vnni", "+avx512bf16", "+amx-tile", "+amx-int8", "+amx-bf16"),
        vector_bits=512,
        registers=32,
        features=(*_V4, "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"),
        log="x86-avx512",
        dot_product="vnni",
        bf16=True,
        tiles=True,
    ),
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
    _arm("arm-v2", "neoverse-v2", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
    _arm("arm-v1", "neoverse-v1", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve"),
    _arm("arm-a76", "cortex-a76", "asimd", "asimddp"),
    _arm("arm-a72", "cortex-a72", "asimd"),
    _arm(GENERIC, "generic", "asimd"),
    _cuda(90, 232448, 132),  # H100, H200
    _cuda(89, 101376, 58, threads_per_sm=1536),  # L4
    _cuda(86, 101376, 72, threads_per_sm=1536),  # A10
    _cuda(80, 166912, 108),  # A100
    _cuda(75, 65536, 40, threads_per_sm=1024),  # T4
)


def names() -> tuple[str, ...]:
    """The names of the rows, as a user may type them beside `native`."""
    return tuple(row.name for row in TABLE)


def resolve(name: str = "native", threads: int | None = None) -> Target:
    """The row of that name with its number of threads (None: the cores this process may use).

    `native` is the best row for this processor, `aarch64-NAME` a row with what LLVM knows of the
    processor of that name. UsageError for an unknown name, PlatformError where no row fits this
    processor.
    """
    if name.startswith(f"{GENERIC}-"):
        row = _processor(name.removeprefix(f"{GENERIC}-"))
    else:
        row = native() if name == "native" else _row(name)
    cores = 1 if row.gpu else threads or available_cores()  # no thread of the host computes there
    return dataclasses.replace(row, threads=cores)


def native(features: Collection[str] | None = None, arch: str | None = None) -> Target:
    """The first row whose features are all in `features` (default: this processor's)."""
    arch = arch or platform.machine()
    present = cpu_features() if features is None else frozenset(features)
    mine = of_arch(arch)
    for row in mine:
        if fits(row, present, arch):
            return row
    lacks = [feature for row in mine[-1:] for feature in row.features if feature not in present]
    reason = f"lacks {' '.join(lacks)}" if mine else f"is {arch}"
    raise PlatformError(
        f"no target fits this machine: it {reason}", f"name a target: {', '.join(names())}"
    )


def of_arch(arch: str) -> list[Target]:
    """The rows of an architecture, the one that asks most of a processor first."""
    return [row for row in TABLE if row.arch == arch]


def of_this_machine(row: Target) -> Target:
    """The row itself, or this machine's where its code cannot be run here."""
    if is_foreign(row) or "musl" in row.triple:
        return dataclasses.replace(native(), threads=row.threads)
    return row


def with_lengths(
    row: Target, lengths: Sequence[int] | None, max_length: int | None = None
) -> Target:
    """The row whose kernels are measured on sequences of these lengths, each counted as often as
    it stands there; None: of those that the row has, and of 2048 tokens, or as many as a model
    takes, where these are more than 512.
    """
    if lengths:
        mix = {tokens: float(lengths.count(tokens)) for tokens in sorted(set(lengths))}
        return dataclasses.replace(row, mix=tuple(mix.items()))
    longest = LONG if max_length is None else min(LONG, max_length)
    if longest <= USUAL or longest < max(tokens for tokens, _ in row.mix):
        return row
    return dataclasses.replace(row, mix=(*row.mix, (longest, 1.0)))


def with_libc(row: Target, libc: str) -> Target:
    """The row linked for another C library: "glibc" (its own) or "musl"."""
    if libc == "glibc":
        return row
    return dataclasses.replace(row, triple=f"{row.arch}-linux-{libc}")


def fits(row: Target, features: Collection[str], arch: str | None = None) -> bool:
    """Whether a processor of that architecture (default: this one's) can run the row's code."""
    return row.arch == (arch or platform.machine()) and set(features).issuperset(row.features)


def is_foreign(row: Target) -> bool:
    """Whether the row's code is for another architecture than this machine's."""
    return row.arch != platform.machine()


def _row(name: str) -> Target:
    for row in TABLE:
        if row.name == name:
            return row
    raise UsageError(f"target '{name}' is unknown{nearest(name, ('native', *names()))}")


def with_processor(name: str, processor: str) -> str:
    """The name of the target for one processor of an architecture; UsageError where it has none."""
    if name != GENERIC:
        raise UsageError(
            f"target '{name}' has its own processor", f"give --mcpu with --target {GENERIC}"
        )
    return f"{GENERIC}-{processor}"


def _processor(processor: str) -> Target:
    """A row of any ARM processor that LLVM knows, with its features."""
    import tvm

    target = tvm.target.Target({**_row(GENERIC).tvm, "mattr": []})
    known = [str(name) for name in tvm.get_global_func("target.llvm_get_cpu_archlist")(target)]
    if processor not in known:
        raise UsageError(f"processor '{processor}' is unknown{nearest(processor, known)}")
    target = tvm.target.Target({**_row(GENERIC).tvm, "mcpu": processor, "mattr": []})
    has = tvm.get_global_func("target.target_has_feature")
    features = [name for name, llvm in ARM_FEATURES.items() if has(llvm, target)]
    return _arm(f"{GENERIC}-{processor}", processor, *features)


def tvm_target(row: Target, threads: int | None = None) -> tvm.target.Target:
    """TVM's own form of the row; "num-cores" is what its tuner plans parallel loops for."""
    import tvm

    cores = {} if row.gpu else {"num-cores": threads or row.threads}
    return tvm.target.Target({**row.tvm, **cores})
