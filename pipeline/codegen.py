"""From TIR to machine code: the one place that says with which of TVM's passes."""

from __future__ import annotations

from typing import Any

import tvm

from bertile.targets import Target, tvm_target

# Our kernels have no blocks to compact and no conditions to hoist, and LLVM finds common
# subexpressions itself: without these a wide tile is built in two thirds of the time, to the same
# machine code.
SKIPPED = ("s_tir.CompactBufferAllocation", "s_tir.HoistIfThenElse", "tirx.CommonSubexprElim")


def context() -> tvm.transform.PassContext:
    """The pass context in which kernels are built, in trials and in bundles alike."""
    return tvm.transform.PassContext(disabled_pass=list(SKIPPED))


def build_kernel(func: tvm.tirx.PrimFunc, row: Target) -> Any:
    """The compiled kernel, as a function of its arguments."""
    mod = tvm.IRModule({"kernel": func.with_attr("global_symbol", "kernel")})
    with context():
        return tvm.tirx.build(mod, target=tvm_target(row))["kernel"]
