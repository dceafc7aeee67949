"""Compiles TIR to machine code: the one place that says with which of TVM's passes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tvm

from bertile.base import scratch
from bertile.base.errors import BertileError
from bertile.codegen.job_queue import with_queue
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
    return compiled(with_queue(func), row)["kernel"]


def export_kernel(func: tvm.tirx.PrimFunc, row: Target, library: Path) -> None:
    """Write the kernel as a shared library for its row, which any machine can load."""
    export_library(compiled(with_queue(func), row), row, library)


def export_library(executable: Any, row: Target, library: Path) -> None:
    """Link what TVM has compiled, with what it imports, to a shared library for a row.

    The same code gives the same bytes: objects have fixed names in a directory that has none.
    """
    with scratch.directory("link-") as place:
        executable.export_library(
            str(library),
            fcompile=lambda out, objects, options=None: link(row, out, objects),
            workspace_dir=str(place),
        )


def link(row: Target, output: str, objects: Sequence[str | Path]) -> None:
    """Link objects, all in one directory, to a shared library for a row."""
    linker = link_command(row)
    paths = [Path(file).absolute() for file in objects]
    place, output = paths[0].parent, os.path.abspath(output)
    # not cc.create_shared, whose linker is a single word
    names = [os.path.relpath(path, place) for path in paths]
    line = [*linker, "-shared", "-fPIC", "-o", output, *names]
    environment = {**os.environ, "TMPDIR": str(place)}
    done = subprocess.run(
        line, capture_output=True, text=True, check=False, cwd=place, env=environment
    )
    if done.returncode:
        reason = " ".join(done.stderr.split())[-500:]
        raise BertileError(f"{' '.join(linker)} cannot link {output}: {reason}")


def compiled(func: tvm.tirx.PrimFunc, row: Target) -> Any:
    """TVM's module of the kernel, which is called ``kernel`` in it."""
    mod = tvm.IRModule({"kernel": func.with_attr("global_symbol", "kernel")})
    with context():
        return tvm.tirx.build(mod, target=tvm_target(row))
