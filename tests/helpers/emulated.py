"""Kernels of an ARM row, run by qemu-aarch64 without TVM's runtime: one library, one run.

The calls go to a program (``emulated_main.c``) in a file: how many, then for each the kernel and
its arguments, each with type code, bits, axes, whether it is a result, shape, and the values of
what is none. Numbers are of 32 bits, shapes of 64.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi.libinfo

from bertile.codegen import llvm
from bertile.schedules.cpu import SCHEDULES
from bertile.schedules.schedule import Sample
from bertile.targets.rows import Target, tvm_target

QEMU = "qemu-aarch64"
# The processor of qemu that has the row's features, and as few others as qemu's processors allow.
PROCESSORS = {"arm-a72": "cortex-a72", "arm-a76": "cortex-a76", "arm-v1": "max", "arm-v2": "max"}
TYPE_CODES = {"i": 0, "u": 1, "f": 2}


def need_qemu() -> None:
    """Skip, with the reason, where ARM code cannot be run."""
    if shutil.which(QEMU) is None:
        pytest.skip(f"{QEMU} was not found: install qemu-user (`make test-arm` does)")


@dataclass
class Emulated:
    """Collects calls of kernels; ``run`` builds and runs them all."""

    row: Target
    directory: Path
    kernels: dict[str, Any] = field(default_factory=dict)
    calls: list[tuple[int, Sequence[np.ndarray], Sequence[np.ndarray]]] = field(
        default_factory=list
    )

    def add(self, task, blocks=2, knobs=None, seed=0) -> tuple[int, Sample]:
        """A call of a task's kernel on its sample; the call's place among the results."""
        schedule = SCHEDULES[task.operation]
        knobs = schedule.default(task, self.row) if knobs is None else knobs
        sample = schedule.sample(task, blocks, np.random.default_rng(seed))
        weights = schedule.pack(task, knobs, sample.weights, self.row)
        key = f"{task.key}{sorted(knobs.items())}"
        if key not in self.kernels:
            self.kernels[key] = schedule.kernel(task, knobs, self.row)
        return self._call(key, [*sample.activations, *weights], sample.buffers()), sample

    def add_func(self, func, operands, results) -> int:
        """A call of any PrimFunc; the call's place among the results."""
        key = f"{id(func)}"
        self.kernels[key] = func
        return self._call(key, operands, results)

    def _call(self, key: str, operands, results) -> int:
        self.calls.append((list(self.kernels).index(key), operands, results))
        return len(self.calls) - 1

    def run(self) -> list[list[np.ndarray]]:
        """The results of each call. A kernel that writes beside its arguments fails all."""
        program, arguments, written = (
            self.directory / name for name in ("program", "arguments", "results")
        )
        self._link(program)
        arguments.write_bytes(self._arguments())
        line = [QEMU, "-cpu", PROCESSORS[self.row.name], str(program), str(arguments), str(written)]
        done = subprocess.run(line, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{done.returncode}: {done.stderr}"
        data, results = written.read_bytes(), []
        for _, _, forms in self.calls:
            arrays = []
            for form in forms:
                arrays.append(np.frombuffer(data[: form.nbytes], form.dtype).reshape(form.shape))
                data = data[form.nbytes :]
            results.append(arrays)
        assert not data
        return results

    def _link(self, program: Path) -> None:
        names = [f"kernel{i}" for i in range(len(self.kernels))]
        functions = {
            name: func.with_attr("global_symbol", name)
            for name, func in zip(names, self.kernels.values())
        }
        built, table = self.directory / "kernels.o", self.directory / "table.c"
        with llvm.context():
            library = tvm.tirx.build(tvm.IRModule(functions), target=tvm_target(self.row))
        library.write_to_file(str(built), "o")
        declared = "".join(f"extern int __tvm_ffi_{name}();\n" for name in names)
        listed = ", ".join(f"__tvm_ffi_{name}" for name in names)
        table.write_text(f"{declared}int (*const kernels[])() = {{{listed}}};\n")
        sources = [Path(__file__).with_name("emulated_main.c"), table, built]
        line = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-musl", "-static"]
        line += ["-nostdlib", "-ffreestanding", "-O1", "-std=c11", "-o", str(program)]
        line += [f"-I{tvm_ffi.libinfo.find_include_path()}"]
        done = subprocess.run([*line, *map(str, sources)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def _arguments(self) -> bytes:
        parts = [struct.pack("<i", len(self.calls))]
        for kernel, operands, results in self.calls:
            parts.append(struct.pack("<2i", kernel, len(operands) + len(results)))
            for array in operands:
                parts += [_head(array, 0), np.ascontiguousarray(array).tobytes()]
            parts += [_head(array, 1) for array in results]
        return b"".join(parts)


def _head(array: np.ndarray, result: int) -> bytes:
    code = TYPE_CODES[array.dtype.kind]
    axes = array.ndim
    return struct.pack(f"<4i{axes}q", code, array.dtype.itemsize * 8, axes, result, *array.shape)
