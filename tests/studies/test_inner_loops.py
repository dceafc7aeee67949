"""The loop in which a kernel spends its time is found, and measured against its own instruction."""

from __future__ import annotations

import pytest

from bertile.schedules.cpu import SCHEDULES
from bertile.schedules.task import Task
from bertile.studies import inner_loops
from bertile.targets.rows import resolve


@pytest.mark.usefixtures("llvm_mca")
def test_fp32_on_a_cortex_a72_keeps_its_pipe_busy(capsys):
    """One fmla of four floats a cycle is all that it does; the table says how near the loop is."""
    inner_loops.main(["--case", "arm-a72:fp32"])
    header, line = (
        line for line in capsys.readouterr().out.splitlines() if "cortex" in line or "peak" in line
    )
    assert "% of peak" in header
    processor, *kernel, name, _count, _cycles, _per, peak, share, _whole = line.split()
    assert (processor, kernel, name) == ("cortex-a72", ["dense", "fp32"], "fmla")
    assert float(peak) == pytest.approx(4.0, rel=0.05) and 85 <= int(share) <= 100


@pytest.mark.usefixtures("llvm_mca")
def test_counts_are_of_the_loop_that_does_the_work():
    """24 accumulators of 16 lanes, unrolled four times."""
    task = Task("dense", inner_loops.LAYER)
    row = resolve("x86-avx512", 1)
    loop = inner_loops.inner_loop(task, row, SCHEDULES["dense"].default(task, row))
    assert (loop.instruction, loop.multiply_adds) == ("vfmadd231ps", 24 * 16 * 4)
    assert loop.peak == pytest.approx(16, rel=0.05) and loop.share > 0.8
