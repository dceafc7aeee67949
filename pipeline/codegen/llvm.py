"""Compiles TIR to machine code: the one place that says with which of TVM's passes."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import tvm

from bertile.base.errors import BertileError
from bertile.targets.linker import link_command
from bertile.targets.rows import Target, tvm_target

# Our kernels have no blocks to compact and no conditions to hoist, and LLVM finds common
# subexpressions itself: without these a wide tile is built in two thirds of the time, to the same
# machine code.
SKIPPED = ("s_tir.CompactBufferAllocation", "s_tir.HoistIfThenElse", "tirx.CommonSubexprElim")


def context() -> tvm.transform.PassContext:
    """The pass context in which kernels are built, in trials and in bundles alike."""
    return tvm.transform.PassContext(disabled_pass=list(SKIPPED))


def build_kernel(func: tvm.tirx.PrimFunc, row: Target) -> Any:
    """The compiled kernel, as a function of its arguments."""
    return compiled(func, row)["kernel"]


def export_kernel(func: tvm.tirx.PrimFunc, row: Target, library: Path) -> None:
    """Write the kernel as a shared library for its row, which any machine can load."""
    compiled(func, row).export_library(
        str(library), fcompile=lambda out, objects, options=None: link(row, out, objects)
    )


def link(row: Target, output: str, objects: Any) -> None:
    """Link objects to a shared library for a row."""
    linker = link_command(row)
    # not cc.create_shared, whose linker is a single word
    line = [*linker, "-shared", "-fPIC", "-o", output, *map(str, objects)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = " ".join(done.stderr.split())[-500:]
        raise BertileError(f"{' '.join(linker)} cannot link {output}: {reason}")


def compiled(func: tvm.tirx.PrimFunc, row: Target) -> Any:
    """TVM's module of the kernel, which is called ``kernel`` in it."""
    mod = tvm.IRModule({"kernel": func.with_attr("global_symbol", "kernel")})
    with context():
        return tvm.tirx.build(mod, target=tvm_target(row))
