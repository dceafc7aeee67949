"""Builds a plan, the kernels' machine code and their packed weights from an optimized graph."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bertile.backends.cuda import plan
from bertile.backends.cuda.lowering import lower
from bertile.base.errors import BertileError
from bertile.bundle.manifest import interface_of
from bertile.codegen.cuda import compiler, cubin
from bertile.codegen.cuda.cubin import Resources
from bertile.cuda_loader import CUBIN, PLAN, PTX
from bertile.graph.graph import Graph
from bertile.loading.interface import INTERFACE
from bertile.lower.built import Built, kernel_entry
from bertile.run.cuda.emulated_model import SOURCE
from bertile.targets.rows import Target
from bertile.tune.log.chooser import Chooser


def build(
    graph: Graph, chooser: Chooser, row: Target, directory: Path, cache_dir: str | None = None
) -> Built:
    """Choose knobs, lower, write the plan and compile, into files of ``directory``."""
    lowered = lower(graph, row, chooser.knobs)
    written = plan.write(graph, lowered, row)
    program = compiler.compile(written.source, row, cache_dir)
    resources = cubin.read(program.cubin)
    _check(written.content["steps"], resources, row)
    directory.mkdir(parents=True, exist_ok=True)
    content = {**written.content, INTERFACE: interface_of(graph, written.params)}
    contents = {PLAN: json.dumps(content, indent=1).encode() + b"\n"}
    contents |= {CUBIN: program.cubin, PTX: program.ptx, SOURCE: written.source.encode()}
    for name, content in contents.items():
        (directory / name).write_bytes(content)
    ours = [
        kernel_entry(task, calls, *chooser.choices[task]) for task, calls in lowered.tasks.items()
    ]
    generic = [
        {"name": name, "operation": name, "shape": {}, "provenance": "generic", "calls": calls}
        for name, calls in written.generic.items()
    ]
    kernels = [
        {**kernel, "entries": _described(written.entries[kernel["name"]], resources)}
        for kernel in (*ours, *generic)
    ]
    files = {name: directory / name for name in contents}
    versions = {"cuda_compiler": program.compiler}
    return Built(files, written.params, kernels, lowered.fallthrough, versions)


def _described(entries: Iterable[str], resources: dict[str, Resources]) -> dict[str, Any]:
    """What the entries of a kernel take: registers and bytes of local memory (spilled ones are
    there) of a thread, static shared memory of a block; instructions of tensor cores.
    """
    return {
        entry: {
            "registers": resources[entry].registers,
            "shared": resources[entry].shared,
            "local": resources[entry].local,
            "tensor": resources[entry].tensor,
        }
        for entry in entries
    }


def _check(steps: Iterable[dict[str, Any]], resources: dict[str, Resources], row: Target) -> None:
    """A kernel that asks for more than the GPU has would fail at its first launch."""
    for step in steps:
        kernel = resources[step["entry"]]
        shared = kernel.shared + step["shared"]
        if kernel.registers * step["threads"] > row.gpu.registers_per_sm:
            what = f"{kernel.registers} registers for each of {step['threads']} threads"
        elif shared > row.gpu.shared_per_block:
            what = f"{shared} bytes of shared memory"
        else:
            continue
        raise BertileError(
            f"the kernel {step['entry']} takes {what}, more than {row.name} has",
            "report the model with `bertile doctor`'s output",
        )
