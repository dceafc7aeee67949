"""Every operator that reaches the lowering has a row, and a schedule that computes it."""

from __future__ import annotations

import pytest

from bertile.graph import ops
from bertile.lower.operators import OPERATORS
from bertile.numerics.precision import PRECISIONS
from bertile.schedules import cpu, cuda


def test_every_operator_with_a_kernel_has_a_row():
    taken_out = {"fake_quantize"}  # by collect_quantization, before anything is lowered
    assert set(OPERATORS) == set(ops.TYPES) - taken_out


@pytest.mark.parametrize("schedules", [cpu.SCHEDULES, cuda.SCHEDULES], ids=["cpu", "cuda"])
def test_every_row_has_a_schedule_of_its_name(schedules):
    assert set(OPERATORS) <= set(schedules)


def test_every_precision_is_met_by_a_row_of_each_backend():
    from bertile.backends.cpu import precisions
    from bertile.numerics import eight_bit

    assert set(PRECISIONS) - set(precisions.PRECISIONS) == {"tf32"}  # GPUs alone have it
    assert set(eight_bit.SEEN) == set(precisions.PRECISIONS)
