"""Targets: rows are consistent, `native` is the best that fits, the code keeps to the features."""

from __future__ import annotations

import re
import sys

import pytest

from bertile.base.errors import PlatformError, UsageError
from bertile.targets import linker
from bertile.targets import rows as targets
from bertile.targets.linker import link_command
from bertile.targets.rows import TABLE, Target, fits, native, resolve, tvm_target

X86 = [row for row in TABLE if row.arch == "x86_64"]
ARM = [row for row in TABLE if row.arch == "aarch64"]
CPUS = [row for row in TABLE if row.gpu is None]
CUDA = [row for row in TABLE if row.gpu is not None]
AVX512 = [row for row in TABLE if row.vector_bits == 512]
# LLVM's name where it is not the name in /proc/cpuinfo
LLVM_NAMES = {
    "abm": "lzcnt",
    "bmi1": "bmi",
    "avx512_vnni": "avx512vnni",
    "avx512_bf16": "avx512bf16",
    **{name: name.replace("_", "-") for name in ("amx_tile", "amx_int8", "amx_bf16")},
    **targets.ARM_FEATURES,
}
# What processors with AVX-512, and those of the ARM rows, have beside, and no row may use.
FOREIGN = (
    "avx512vbmi",
    "avx512vbmi2",
    "avx512fp16",
    "amx-fp16",
    "sha",
    "vaes",
    "gfni",
    "sse4a",
    "pku",
    "aes",
    "sha2",
    "crc",
    "lse",
    "rdm",
    "rcpc",
    "complxnum",
)


def by_name(row: Target) -> str:
    return row.name


def test_native_is_the_first_row_that_the_processor_has() -> None:
    for rows in (X86, ARM):
        every = {feature for row in rows for feature in row.features}
        assert native(every, rows[0].arch) is rows[0]


@pytest.mark.parametrize("row", TABLE, ids=by_name)
def test_native_is_the_row_itself_on_a_processor_with_just_its_features(row: Target) -> None:
    expected = targets.resolve("arm-a72") if row.name == targets.GENERIC else row
    assert native(row.features, row.arch).name == expected.name


def test_native_names_what_is_missing_when_no_row_fits() -> None:
    features = set(X86[-1].features) - {"avx2", "fma"}
    with pytest.raises(PlatformError, match="it lacks fma avx2; name a target: x86-amx, "):
        native(features, "x86_64")
    with pytest.raises(PlatformError, match="it lacks asimd; name a target"):
        native((), "aarch64")
    with pytest.raises(PlatformError, match="it is riscv64"):
        native(TABLE[0].features, "riscv64")


def test_resolve_finds_the_row_and_its_threads() -> None:
    row = resolve("x86-avx2", threads=3)
    assert (row.name, row.threads) == ("x86-avx2", 3)
    assert resolve("x86-avx2").threads >= 1


def test_resolve_suggests_the_nearest_name_when_unknown() -> None:
    with pytest.raises(UsageError, match=r"'x86-avx521' is unknown; did you mean 'x86-avx512'\?"):
        resolve("x86-avx521")


def test_rows_have_different_names_and_a_log_that_is_a_row() -> None:
    assert len({row.name for row in TABLE}) == len(TABLE)
    assert {row.log for row in TABLE} <= set(targets.names())


def test_rows_with_one_log_agree_on_what_fp32_schedules_ask() -> None:
    for row in TABLE:
        owner = next(other for other in TABLE if other.name == row.log)
        assert (row.vector_bits, row.registers) == (owner.vector_bits, owner.registers)
        assert set(row.features) >= set(owner.features)


def test_fits_asks_for_features_and_architecture() -> None:
    row = TABLE[-1]
    assert fits(row, row.features, row.arch)
    assert not fits(row, row.features[1:], row.arch)
    assert not fits(row, row.features, "riscv64")


@pytest.mark.parametrize(
    ("processor", "facts"),
    [
        ("cortex-a53", (None, False)),
        ("cortex-a55", ("sdot", False)),
        ("cortex-a710", ("usmmla", True)),
        ("cortex-a55x", None),
    ],
)
def test_a_processor_that_llvm_knows_is_a_row_with_its_features(processor, facts) -> None:
    tvm = pytest.importorskip("tvm")
    name = targets.with_processor("aarch64", processor)
    if facts is None:
        with pytest.raises(UsageError, match="'cortex-a55x' is unknown; did you mean 'cortex-a"):
            resolve(name)
        return
    row = resolve(name, threads=2)
    assert (row.name, row.log, row.threads) == (name, name, 2)
    assert (row.dot_product, row.bf16) == facts
    assert str(tvm_target(row).attrs["mcpu"]) == processor
    has = tvm.get_global_func("target.target_has_feature")
    features = {key for key, llvm in targets.ARM_FEATURES.items() if has(llvm, tvm_target(row))}
    assert features == set(row.features)


def test_a_processor_is_refused_for_a_row_that_has_its_own() -> None:
    with pytest.raises(UsageError, match="'arm-a76' has its own processor; give --mcpu with"):
        targets.with_processor("arm-a76", "cortex-a55")


@pytest.mark.parametrize("row", CPUS, ids=by_name)
def test_tvm_target_has_the_features_of_the_row_and_no_others(row: Target) -> None:
    tvm = pytest.importorskip("tvm")
    has = tvm.get_global_func("target.target_has_feature")
    target = tvm_target(row, threads=3)
    assert int(target.attrs["num-cores"]) == 3
    ours = {LLVM_NAMES.get(name, name).replace("sse4_", "sse4.") for name in row.features}
    assert [name for name in ours if not has(name, target)] == []
    others = {LLVM_NAMES.get(name, name) for other in TABLE for name in other.features} - ours
    assert [name for name in (*FOREIGN, *others) if has(name, target)] == []


@pytest.mark.parametrize("row", CPUS, ids=by_name)
def test_a_vectorized_loop_uses_the_widest_registers_of_the_row(row: Target) -> None:
    tvm = pytest.importorskip("tvm")
    widest = {512: "zmm", 256: "ymm", 128: ".4s"}[row.vector_bits]
    asm = tvm.tirx.build(_copy_loop(tvm, lanes=16), target=tvm_target(row)).inspect_source("asm")
    assert widest in asm
    assert ("zmm" in asm) == (row.vector_bits == 512)


@pytest.mark.parametrize("row", AVX512, ids=by_name)
def test_llvm_prefers_512_bits_where_it_vectorizes_by_itself(row: Target) -> None:
    tvm = pytest.importorskip("tvm")
    halves = {
        **row.tvm,
        "mattr": [attribute for attribute in row.tvm["mattr"] if "prefer" not in attribute],
    }
    loop = _copy_loop(tvm, lanes=1)
    counts = []
    for target in (tvm_target(row), tvm.target.Target(halves)):
        asm = tvm.tirx.build(loop, target=target).inspect_source("asm")
        counts.append(len(re.findall("zmm", asm)))
    assert counts[0] > counts[1]


@pytest.mark.parametrize("row", CUDA, ids=by_name)
def test_a_row_of_gpus_has_their_facts(row: Target) -> None:
    gpu = row.gpu
    assert row.name == f"cuda-sm{gpu.capability}"
    assert row.features == (f"sm_{gpu.capability}",)
    assert gpu.bf16 == gpu.async_copy == row.bf16 == (gpu.capability >= 80)
    assert gpu.wgmma == (gpu.capability == 90)
    assert gpu.shared_per_block <= gpu.shared_per_sm
    assert gpu.threads_per_sm % 512 == 0


def test_tvm_knows_the_rows_of_gpus() -> None:
    pytest.importorskip("tvm")
    assert [str(tvm_target(row).attrs["arch"]) for row in CUDA] == [r.features[0] for r in CUDA]


def test_no_processor_fits_a_row_of_gpus() -> None:
    features = {feature for row in TABLE for feature in row.features}
    assert not any(fits(row, features, arch) for row in CUDA for arch in ("x86_64", "aarch64"))


def test_link_command_is_the_compiler_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(linker.shutil, "which", lambda name: f"/bin/{name}")
    assert link_command(TABLE[0]) == ["/bin/cc"]


def test_link_command_is_ziglang_for_another_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(linker.util, "find_spec", lambda name: name)
    expected = [sys.executable, "-m", "ziglang", "cc", "-target", "x86_64-linux-gnu.2.28"]
    assert link_command(TABLE[0]) == expected
    monkeypatch.setattr(targets.platform, "machine", lambda: "x86_64")
    assert link_command(ARM[0]) == [*expected[:-1], "aarch64-linux-gnu.2.28"]


def test_link_command_says_what_to_install_when_there_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linker.shutil, "which", lambda name: None)
    monkeypatch.setattr(linker.util, "find_spec", lambda name: None)
    with pytest.raises(PlatformError, match="pip install ziglang"):
        link_command(TABLE[0])


def _copy_loop(tvm, lanes: int):
    from tvm import te

    size = te.var("n")
    source = te.placeholder((size, 16), "float32", name="source")
    twice = te.compute((size, 16), lambda i, j: source[i, j] * source[i, j], name="twice")
    func = te.create_prim_func([source, twice]).with_attr("global_symbol", "main")
    sch = tvm.s_tir.Schedule(func)
    if lanes > 1:
        sch.vectorize(sch.get_loops("twice")[1])
    return sch.mod
