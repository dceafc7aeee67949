"""llvm-mca is found, asked in one call and understood; what LLVM describes wrongly is put right."""

from __future__ import annotations

import pytest

from bertile.base.errors import BertileError, PlatformError, UsageError
from bertile.targets.rows import resolve
from bertile.tune.estimate import mca

N1 = mca.MODELS["arm-a76"]


def fake(directory, name: str, version: int) -> None:
    path = directory / name
    path.write_text(f"#!/bin/sh\necho '  Debian LLVM version {version}.0.6'\n", encoding="ascii")
    path.chmod(0o755)


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_absent_tool_is_refused_with_the_way_to_get_it(path):
    with pytest.raises(PlatformError, match=r"was not found.*apt-get install llvm-19"):
        mca.tool(N1)


def test_older_tool_is_taken_only_where_its_model_suffices(path):
    fake(path, "llvm-mca", 14)
    assert mca.tool(mca.MODELS["arm-a72"]) == str(path / "llvm-mca")
    with pytest.raises(PlatformError, match="LLVM 14; the model of neoverse-n1 wants LLVM 19"):
        mca.tool(N1)
    fake(path, "llvm-mca-19", 19)
    assert mca.tool(N1) == str(path / "llvm-mca-19")


def test_row_without_a_model_is_refused_and_a_processor_finds_its_own():
    with pytest.raises(UsageError, match=r"known: .*arm-a72"):
        mca.model_of(resolve("aarch64", 1))
    assert mca.model_of(resolve("aarch64-neoverse-v1", 1)) is mca.MODELS["arm-v1"]


@pytest.mark.usefixtures("llvm_mca")
def test_throughput_is_of_the_pipes_and_a_chain_waits_for_itself():
    """A Neoverse N1 has two pipes for fmla, of four cycles."""
    apart = [f"\tfmla v{n}.4s, v30.4s, v31.s[0]" for n in range(16)]
    chain = ["\tsdot v0.4s, v30.16b, v31.16b", "\tfmla v1.4s, v1.4s, v31.4s"]
    empty, wide, slow = mca.analyse([[], apart, chain], N1)
    assert empty == mca.Stretch(0, 0.0)
    assert wide.instructions == 16 and wide.cycles == pytest.approx(8.0, rel=0.02)
    assert slow.cycles == pytest.approx(4.0, rel=0.05)


@pytest.mark.usefixtures("llvm_mca")
def test_registers_multiply_as_fast_as_memory_does_on_zen4():
    zen = mca.MODELS["x86-avx512-vnni"]
    loads = ["\tvpbroadcastd -4(%rbp,%r10), %zmm31"]
    sums = [f"\tvpdpbusd %zmm30, %zmm31, %zmm{n}" for n in range(12)]
    (stretch,) = mca.analyse([loads + sums], zen)
    assert stretch.cycles == pytest.approx(12.0, rel=0.05)


@pytest.mark.usefixtures("llvm_mca")
def test_text_that_is_no_assembly_is_an_error():
    with pytest.raises(BertileError, match=r"cannot read the kernel: .*error"):
        mca.analyse([["\tnonsense v0"]], N1)
