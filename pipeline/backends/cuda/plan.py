"""Writes the plan that a loader follows for a request: the launches with their arguments, the
buffers between them, and the text of every kernel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx

from bertile.backends.cuda import generic
from bertile.backends.cuda.extents import extent, product, with_names
from bertile.backends.cuda.lowering import PREFIX
from bertile.base.errors import ModelError
from bertile.graph import ops
from bertile.graph.graph import Graph
from bertile.graph.importer import TABLE
from bertile.lower.lowering import Lowered
from bertile.schedules.cuda.source import Extent, Kernel
from bertile.targets.rows import Target

SCHEMA = 1
_BYTES = {"bfloat16": 2, "bool": 1}  # what numpy does not know, or by another name
_LEAVES = ("tokens_out", "rows_out", "first_token")  # these read rows, others write them

Place = tuple[str, int]  # ("input" | "weight" | "buffer", number)


@dataclass
class Plan:
    """``content`` is plan.json; ``generic`` counts the calls of kernels that no schedule made, by
    the name of each, ``entries`` has the kernel of every entry.
    """

    content: dict[str, Any]
    source: str
    params: dict[str, np.ndarray]
    generic: Counter[str] = field(default_factory=Counter)
    entries: dict[str, list[str]] = field(default_factory=dict)


def write(graph: Graph, lowered: Lowered, row: Target) -> Plan:
    """The plan of a lowered graph."""
    return _Writer(graph, lowered, row).run()


class _Writer:
    def __init__(self, graph: Graph, lowered: Lowered, row: Target) -> None:
        self.graph, self.kernels, self.row = graph, lowered.kernels, row
        self.mod = generic.scheduled(lowered.mod, row)
        self.main = self.mod["main"]
        self.params = dict(lowered.params)
        self.inputs = list(self.main.params[: int(self.main.attrs["num_input"])])
        self.names = _symbols(self.inputs)
        self.places: dict[Any, Any] = {var: ("input", i) for i, var in enumerate(self.inputs)}
        for i, var in enumerate(self.main.params[len(self.inputs) :]):
            self.places[var] = ("weight", i)
        self.buffers: list[Extent] = []
        self.steps: list[dict[str, Any]] = []
        self.sources: dict[str, str] = {}
        self.loops: dict[str, generic.Loops] = {}
        self.calls: Counter[str] = Counter()
        self.entries: dict[str, list[str]] = {}

    def run(self) -> Plan:
        for block in self.main.body.blocks:
            for binding in block.bindings:
                self.places[binding.var] = self._value(binding.value)
        result = self._value(self.main.body.body)
        content = {
            "schema": SCHEMA,
            "inputs": [{"name": v.name, **self._kind(v.ty)} for v in self.inputs],
            "weights": list(self.params),
            "buffers": [{"bytes": size} for size in self.buffers],
            "outputs": self._outputs(result if isinstance(result, list) else [result]),
            "steps": self.steps,
        }
        return Plan(content, "".join(self.sources.values()), self.params, self.calls, self.entries)

    def _outputs(self, places: Sequence[Place]) -> list[dict[str, Any]]:
        ret = self.main.ret_ty
        types = list(ret.fields) if isinstance(ret, relax.TupleType) else [ret]
        if any(kind != "buffer" for kind, _ in places) or len(set(places)) < len(places):
            raise ModelError(
                "an output of the model is one of its inputs or weights, or another output",
                "compile the model for a CPU",
            )
        return [
            {"name": name, **self._kind(ty), "buffer": number}
            for name, ty, (_, number) in zip(self.graph.exported.outputs, types, places)
        ]

    def _kind(self, ty: Any) -> dict[str, Any]:
        return {"dtype": str(ty.dtype), "shape": self._shape(ty)}

    def _shape(self, ty: Any) -> list[Extent]:
        return [extent(axis, self.names) for axis in ty.shape]

    # Expressions.

    def _value(self, expr: Any) -> Any:
        """The place of a value, a list of them for a tuple."""
        if isinstance(expr, relax.Var):
            return self.places[expr]
        if isinstance(expr, relax.Tuple):
            return [self._value(field) for field in expr.fields]
        if isinstance(expr, relax.TupleGetItem):
            return self._value(expr.tuple_value)[expr.index]
        if isinstance(expr, tvm.ir.GenericConst):
            return self._constant(expr.value.numpy())
        if ops.is_call(expr, "relax.call_dps_packed"):
            return self._kernel(expr)
        if ops.is_call(expr, "relax.call_tir"):
            return self._loops(expr)
        name = expr.op.name if isinstance(expr, relax.Call) else type(expr).__name__
        raise ModelError(
            f"the operator {name.removeprefix('relax.')} has no kernel for a GPU",
            "compile the model for a CPU",
        )

    def _constant(self, value: np.ndarray) -> Place:
        for number, (name, known) in enumerate(self.params.items()):
            if name.startswith("folded_") and known.dtype == value.dtype:
                if np.array_equal(known, value):
                    return ("weight", number)
        self.params[f"folded_{len(self.params)}"] = value
        return ("weight", len(self.params) - 1)

    def _results(self, call: relax.Call) -> tuple[list[Any], list[Place]]:
        types = list(call.ty.fields) if isinstance(call.ty, relax.TupleType) else [call.ty]
        return types, [self._buffer(product([*self._shape(t), _size(t.dtype)])) for t in types]

    def _buffer(self, size: Extent) -> Place:
        self.buffers.append(size)
        return ("buffer", len(self.buffers) - 1)

    def _kernel(self, call: relax.Call) -> Any:
        """A kernel of a schedule of ours."""
        name = str(call.args[0].global_symbol)
        if name == PREFIX:
            return self._value(call.args[1].fields[0])
        kernel: Kernel = self.kernels[name]
        operands = list(call.args[1].fields)
        types, results = self._results(call)
        places = [*(self._value(operand) for operand in operands), *results]
        types = [*(operand.ty for operand in operands), *types]
        named = dict(zip(kernel.operands, places, strict=True))
        symbols = {"rows": self._rows(name, operands, call)}
        for operand, ty in zip(kernel.operands, types):
            symbols |= {f"{operand}_{axis}": size for axis, size in enumerate(self._shape(ty))}
        for scratch, size in kernel.scratch.items():
            named[scratch] = self._buffer(with_names(size, symbols))
        for launch in kernel.launches:
            self._step(
                launch.entry,
                tuple(with_names(size, symbols) for size in launch.grid),
                launch.threads,
                [
                    list(named[argument])
                    if argument in named
                    else ["int32", with_names(argument, symbols)]
                    for argument in launch.arguments
                ],
                launch.shared,
                with_names(launch.when, symbols),
            )
        self.sources.setdefault(name, kernel.source)
        self.entries[name] = [launch.entry for launch in kernel.launches]
        return results if len(results) > 1 else results[0]

    def _rows(self, name: str, operands: Sequence[Any], call: relax.Call) -> Extent:
        """How many rows a kernel of ours is run on."""
        if name.startswith(_LEAVES):
            return extent(operands[0].ty.shape[0], self.names)
        ty = call.ty.fields[0] if isinstance(call.ty, relax.TupleType) else call.ty
        return extent(ty.shape[0], self.names)

    def _loops(self, call: relax.Call) -> Any:
        """A kernel of TVM's."""
        name = str(call.args[0].name_hint)
        if name not in self.loops:
            self.loops[name] = generic.loops(f"loops_{name}", self.mod[call.args[0]], self.row)
            self.sources[f"loops_{name}"] = self.loops[name].source
        self.calls[f"loops_{name}"] += 1
        loops = self.loops[name]
        types, results = self._results(call)
        places: list[Any] = []
        values: dict[Any, Extent] = {}
        operands = [*((value.ty, value) for value in call.args[1].fields), *zip(types, results)]
        operands += [
            (value.ty, value) for value in (call.args[2].values if len(call.args) > 2 else ())
        ]
        for param, (ty, operand) in zip(loops.func.params, operands, strict=True):
            if hasattr(param.ty, "shape"):
                places.append(operand if isinstance(operand, tuple) else self._value(operand))
                pairs = zip(param.ty.shape, ty.shape)
                values |= {a: extent(b, self.names) for a, b in pairs if isinstance(a, tirx.Var)}
            else:  # a number
                places.append(None)
                values[param] = extent(operand, self.names)
        steps, sizes = loops.steps(values)
        scratch = [self._buffer(size) for size in sizes]
        for step in steps:
            known = {"operand": places, "scratch": scratch}
            arguments = [
                list(known[kind][value]) if kind in known else [kind, value]
                for kind, value in step.arguments
            ]
            self._step(step.entry, step.grid, step.threads, arguments)
        self.entries[f"loops_{name}"] = [step.entry for step in steps]
        return results if len(results) > 1 else results[0]

    def _step(
        self,
        entry: str,
        grid: tuple[Extent, ...],
        threads: int,
        arguments: list[list[Any]],
        shared: int = 0,
        when: Extent = 1,
    ) -> None:
        step = {"entry": entry, "grid": list(grid), "threads": threads, "shared": shared}
        self.steps.append({**step, **({"when": when} if when != 1 else {}), "arguments": arguments})


def _symbols(inputs: Sequence[relax.Var]) -> Mapping[Any, Extent]:
    """TVM's variables for a request's extents, and what the plan calls them."""
    table = next(var for var in inputs if var.name == TABLE)
    pairs = zip((*inputs[0].ty.shape, table.ty.shape[0]), ("batch", "length", "blocks"))
    return {var: name for var, name in pairs if isinstance(var, tirx.Var)}


def _size(dtype: Any) -> int:
    return _BYTES.get(str(dtype)) or np.dtype(str(dtype)).itemsize
