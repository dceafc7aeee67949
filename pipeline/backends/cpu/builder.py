"""Builds lib.so and its packed weights from an optimized graph and chosen knobs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import tvm
from tvm import relax

from bertile.backends.cpu.lowering import lower
from bertile.bundle.manifest import interface_of
from bertile.codegen import llvm
from bertile.codegen.shape_stores import order_shape_stores
from bertile.graph.graph import Graph
from bertile.loader import LIBRARY
from bertile.loading.interface import INTERFACE
from bertile.lower import stages
from bertile.lower.built import Built, kernel_entry
from bertile.lower.fusion import fusion
from bertile.lower.lowering import Lowered
from bertile.schedules.cpu.generic import is_kernel, schedule_generic
from bertile.schedules.task import Task
from bertile.targets.rows import Target, tvm_target
from bertile.tune.log.chooser import Chooser


def build(graph: Graph, chooser: Chooser, row: Target, library: Path) -> Built:
    """Choose knobs, lower, compile and link.

    ``library`` is the path of the shared library to write.
    """
    lowered = lower(graph, row, chooser.knobs, stages.cut(graph))
    target = tvm_target(row)
    mod = fuse_and_schedule(lowered.mod, target, *(stage.entry for stage in lowered.stages))
    text = interface_of(graph, lowered.params)
    executable = compile_module(with_interface(mod, text), target)
    library.parent.mkdir(parents=True, exist_ok=True)
    llvm.export_library(executable, row, library)
    kernels = [
        kernel_entry(task, count, *chooser.choices[task]) | _nonzeros(task, lowered)
        for task, count in lowered.tasks.items()
    ]
    kernels += _generic_entries(mod)
    files = {LIBRARY: library}
    return Built(files, lowered.params, kernels, lowered.fallthrough, stages=lowered.stages)


def fuse_and_schedule(mod: tvm.IRModule, target: tvm.target.Target, *entries: str) -> tvm.IRModule:
    """Legalize and fuse what is left of Relax operators, and schedule the loops that makes.

    `entries` are the functions that are called beside main.
    """
    # cumsum (RoBERTa's positions) has no legalization of its own
    passes = [relax.backend.DispatchSortScan(), *fusion(*entries)]
    with target:
        return schedule_generic(tvm.transform.Sequential(passes)(mod))


def with_interface(mod: tvm.IRModule, text: str) -> tvm.IRModule:
    """The module with a function that returns the text, which loaders compare with the manifest."""
    builder = relax.BlockBuilder(mod)
    with builder.function(INTERFACE, []):
        builder.emit_func_output(tvm.ir.StringImm(text))
    return builder.get()


def compile_module(mod: tvm.IRModule, target: tvm.target.Target) -> Any:
    """The Relax executable of a scheduled module, not yet linked.

    TVM's default CPU pipeline without RewriteDataflowReshape, which expects blocks in every kernel,
    and with the same order of a shape function's stores in every process.
    """
    passes = [
        relax.transform.ToNonDataflow(),
        relax.transform.RemovePurityChecking(),
        relax.transform.CallTIRRewrite(),
        relax.transform.StaticPlanBlockMemory(),
        relax.transform.LowerAllocTensor(),
        relax.transform.KillAfterLastUse(),
        relax.transform.LowerRuntimeBuiltin(),
        relax.transform.ComputePrimValue(),
        relax.transform.VMShapeLower(),
        order_shape_stores(),
        relax.transform.AttachGlobalSymbol(),
    ]
    with llvm.context():
        return relax.build(mod, target=target, relax_pipeline=tvm.transform.Sequential(passes))


def _nonzeros(task: Task, lowered: Lowered) -> dict[str, int]:
    """How many lanes of weights one call of a sparse kernel multiplies, on average."""
    stored, calls = lowered.nonzeros[task], lowered.tasks[task]
    return {"nonzeros": round(stored / calls)} if stored else {}


def _generic_entries(mod: tvm.IRModule) -> list[dict[str, Any]]:
    """The kernels that no schedule of ours made."""
    calls: Counter[str] = Counter()

    def count(expr: Any) -> None:
        if isinstance(expr, relax.Call) and expr.op == tvm.ir.Op.get("relax.call_tir"):
            calls[expr.args[0].name_hint] += 1

    relax.analysis.post_order_visit(mod["main"], count)
    generic = {
        var.name_hint
        for var, func in mod.functions.items()
        if isinstance(func, tvm.tirx.PrimFunc) and not is_kernel(func)
    }
    return [
        {
            "name": name,
            "operation": "generic",
            "shape": {},
            "provenance": "generic",
            "calls": calls[name],
            "decisions": {},
        }
        for name in sorted(generic)
    ]
