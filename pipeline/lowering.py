"""From fused operators to kernels: chooses layouts, packs weights, calls one PrimFunc per task.

    bertile.dense(x (B, S, K), w, b)  →  call_tir(dense_K_N, [x (m, K, 16), w packed, b packed])

What our operators hand to each other stays in lanes; a conversion stands only where another
operator, or the caller, reads or writes a row-major tensor.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm
from tvm import relax

from bertile import ops
from bertile.cuda.forms import GpuForms
from bertile.dense_weights import Arrays, dense_weights, narrowing
from bertile.forms import FP32, GROUPS, Form, Forms
from bertile.graph import Graph
from bertile.importer import TABLE
from bertile.packed_weights import PackedWeights
from bertile.passes.rewriting import shape
from bertile.schedules import schedules_for
from bertile.schedules.cpu.generic import KERNEL
from bertile.schedules.schedule import Knobs
from bertile.schedules.task import Task
from bertile.targets import Target

Choice = Callable[[Task], Knobs]


@dataclass(frozen=True)
class Lowered:
    """A module of kernel calls; ``params`` are its packed weights, in the order of main's
    parameters.

    ``kernels`` are those of a GPU, by their names; those of a CPU are functions of ``mod``.
    ``nonzeros`` counts the lanes of the weights that all calls of a sparse task read together,
    ``fallthrough`` are operators that no schedule of ours covers, as Relax names them.
    """

    mod: tvm.IRModule
    params: dict[str, np.ndarray]
    tasks: Counter[Task]
    nonzeros: Counter[Task]
    fallthrough: list[str]
    kernels: Mapping[str, Any] = field(default_factory=dict)


def tasks(graph: Graph, row: Target | None = None) -> Counter[Task]:
    """The tasks of a graph's fused operators, with how often each is called."""
    forms = forms_of(graph, row)
    return Counter(forms.task(b.var) for b in forms.flow.bindings if ops.is_ours(b.value))


def forms_of(graph: Graph, row: Target | None) -> Forms:
    """In which forms the graph's values lie on that kind of machine."""
    return GpuForms(graph) if row is not None and row.gpu else Forms(graph)


def lower(graph: Graph, row: Target, choose: Choice) -> Lowered:
    """Replace every fused operator by its kernel, with the knobs that ``choose`` gives for its
    task.
    """
    return Lowering(graph, row, choose).run()


class Lowering:
    """One graph's way into kernels; on a GPU some of its steps are others."""

    def __init__(self, graph: Graph, row: Target, choose: Choice) -> None:
        self.graph, self.row, self.choose = graph, row, choose
        self.schedules = schedules_for(row)
        self.forms = forms_of(graph, row)
        self.flow = self.forms.flow
        self.builder = relax.BlockBuilder()
        self.inputs = list(graph.main.params[: int(graph.main.attrs["num_input"])])
        self.table = next(p for p in self.inputs if p.name == TABLE)
        self.weights = PackedWeights(row)
        self.constants = itertools.count()  # constants have no names of their own
        self.rows: dict[relax.Var, Any] = {p: p for p in self.inputs}  # old variable → row-major
        self.lanes: dict[tuple[relax.Var, Form], list[Any]] = {}  # old variable, form → in lanes
        self.shared: dict[Any, Any] = {}  # masks, biases and weights that several layers share
        self.kernels: dict[Task, Any] = {}  # what calls them, or on a GPU the kernel itself
        self.tasks: Counter[Task] = Counter()
        self.fallthrough: list[str] = []

    def run(self) -> Lowered:
        with self.builder.function("main", self.inputs):
            with self.builder.dataflow():
                for binding in self.flow.bindings:
                    self._binding(binding.var, binding.value)
                result = self.flow.definition(self.graph.main.body.body)
                fields = (
                    result.fields
                    if isinstance(result, relax.Tuple)
                    else [self.graph.main.body.body]
                )
                output = self.builder.emit_output(relax.Tuple([self._row_major(f) for f in fields]))
            self.builder.emit_func_output(output)
        mod = self.builder.finalize()
        for name, func in self.graph.mod.functions.items():
            if name.name_hint != "main":  # the importer wrote some operators (Clip) as loops
                mod[name] = func
        main = mod["main"]
        params = [*self.inputs, *self.weights.variables.values()]
        mod["main"] = relax.Function(params, main.body, main.ret_ty, True).with_attr(
            {"global_symbol": "main", "num_input": len(self.inputs)}
        )
        weights = self.weights
        kernels = {task.name: kernel for task, kernel in self.kernels.items()}
        found = (self.tasks, weights.nonzeros, self.fallthrough, kernels)
        return Lowered(mod, weights.values, *found)

    def _binding(self, var: relax.Var, value: Any) -> None:
        if ops.is_ours(value):
            getattr(self, "_" + value.op.name.removeprefix("bertile."))(var, value)
        elif isinstance(value, relax.Var) and (value, FP32) in self.lanes:
            self.lanes[var, FP32] = self.lanes[value, FP32]
        elif not (var.same_as(self.graph.main.body.body) and isinstance(value, relax.Tuple)):
            self._generic(var, value)  # the tuple of results is emitted at the end

    def _generic(self, var: relax.Var, value: Any) -> None:
        """An operator that is not ours, on row-major operands."""
        self.rows[var] = self.builder.emit(self._row_major(value), var.name)
        if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op):
            is_loops = ops.is_call(value, "relax.call_tir")
            name = value.args[0].name_hint if is_loops else value.op.name.removeprefix("relax.")
            self.fallthrough.append(f"{name} ({var.name})")

    # The operators, by name.

    def _dense(self, var: relax.Var, call: relax.Call) -> None:
        x, w, b, *residual = call.args
        task, output = self.forms.task(var), self.forms.output(var)
        activations = [*self._in_form(x, self.forms.input(call))]
        activations += [self._in_lanes(r) for r in residual]
        weights = self._once(
            ("weights", w, task),
            lambda: dense_weights(task, *self._value(w), *self._value(b), self.forms.plan_of(call)),
        )
        weights = [*weights, *narrowing(output, self.graph.plan)]
        self.lanes[var, output] = self._kernel(task, activations, weights, [(var, output)])

    def _attention(self, var: relax.Var, call: relax.Call) -> None:
        qkv, mask, *bias = call.args
        task, output = self.forms.task(var), self.forms.output(var)
        activations = [*self._in_form(qkv, self.forms.input(call)), self._keys(mask), self.table]
        activations += [self._biases(b) for b in bias]
        weights = narrowing(output, self.graph.plan)
        self.lanes[var, output] = self._kernel(task, activations, weights, [(var, output)])

    def _rotary(self, var: relax.Var, call: relax.Call) -> None:
        activations = [self._in_lanes(x) for x in call.args]  # cos and sin once for all layers
        self.lanes[var, FP32] = self._kernel(self.forms.task(var), activations, [], [(var, FP32)])

    def _layer_norm(self, var: relax.Var, call: relax.Call) -> None:
        x, *norm = call.args
        self._normalised(var, [self._in_lanes(x)], [self._value(w) for w in norm])

    def _embedding(self, var: relax.Var, call: relax.Call) -> None:
        count = int(call.attrs["tables"])
        ids = [self._row_major(i) for i in call.args[:count]]
        self._normalised(var, [*ids, self.table], [self._value(w) for w in call.args[count:]])

    def _normalised(self, var: relax.Var, activations: list[Any], weights: Arrays) -> None:
        """A kernel that writes float32, and beside it the form that a layer reads."""
        task, output = self.forms.task(var), self.forms.output(var)
        results = [(var, FP32)] + ([(var, output)] if output != FP32 else [])
        weights = [*weights, *narrowing(output, self.graph.plan)]
        wide, *narrow = self._kernel(task, activations, weights, results)
        self.lanes[var, FP32] = [wide]
        if narrow:
            self.lanes[var, output] = narrow

    def _first_token(self, var: relax.Var, call: relax.Call) -> None:
        activations = [self._in_lanes(call.args[0]), self.table]
        self.rows[var] = self._single(self.forms.task(var), activations, call.ty)

    # Layouts.

    def types(self, old: Any, form: Form) -> list[relax.TensorType]:
        """The types in lanes of a (B, S, C) or (N, C) tensor in a form."""
        *outer, channels = shape(old)
        lanes = self.row.lanes
        blocks = self.table.ty.shape[0] if len(outer) == 2 else (outer[0] + (lanes - 1)) // lanes
        wide = -(-channels // GROUPS[form.kind])
        dtype = "float32" if form == FP32 else "int32"
        types = [relax.TensorType([blocks, wide, lanes], dtype)]
        if form.kind == "int8":  # scale and low of each token
            types.append(relax.TensorType([blocks, 2, lanes], "float32"))
        return types

    def _in_lanes(self, old: Any) -> Any:
        """The value of an old variable in lanes of float32."""
        return self._in_form(old, FP32)[0]

    def _in_form(self, old: Any, form: Form) -> list[Any]:
        """The value of an old variable in lanes, converted at its first use."""
        if (old, form) in self.lanes:
            return self.lanes[old, form]
        if form == FP32:
            tokens = len(shape(old)) == 3
            task = self.forms.layout("tokens_in" if tokens else "rows_in", old)
            operands, weights = [self._row_major(old)] + ([self.table] if tokens else []), []
        else:
            task = self.forms.narrow(old, form)
            operands, weights = [self._in_lanes(old)], narrowing(form, self.graph.plan)
        self.lanes[old, form] = self._kernel(task, operands, weights, [(old, form)])
        return self.lanes[old, form]

    def _row_major(self, expr: Any) -> Any:
        """An old expression with its variables replaced by new row-major ones."""
        if isinstance(expr, relax.Var):
            if expr in self.rows:
                return self.rows[expr]
            if (expr, FP32) in self.lanes:
                return self._out_of_lanes(expr)
            if expr in self.flow.weights:
                return self.weights.parameter(expr.name, self.graph.params[expr.name])
            return expr  # a symbolic extent
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([self._row_major(field) for field in expr.fields])
        if isinstance(expr, relax.TupleGetItem):
            return relax.TupleGetItem(self._row_major(expr.tuple_value), expr.index)
        if isinstance(expr, relax.Call):
            args = [self._row_major(a) for a in expr.args]
            return relax.Call(expr.op, args, attrs=expr.attrs, ty_args=expr.ty_args)
        return expr

    def _out_of_lanes(self, old: relax.Var) -> Any:
        tokens = len(shape(old)) == 3
        task = self.forms.layout("tokens_out" if tokens else "rows_out", old)
        operands = [*self.lanes[old, FP32]] + ([self.table] if tokens else [])
        self.rows[old] = self._single(task, operands, old.ty)
        return self.rows[old]

    def _keys(self, mask: Any) -> Any:
        out = relax.TensorType([self.table.ty.shape[0], self.row.lanes], "float32")
        return self._once(
            ("key_mask", mask),
            lambda: self._single(Task("key_mask"), [self._row_major(mask), self.table], out),
        )

    def _biases(self, bias: Any) -> Any:
        rows, heads, length, _ = bias.ty.shape
        tiles = (length + (self.row.lanes - 1)) // self.row.lanes
        lanes = self.row.lanes
        out = relax.TensorType([rows, heads, tiles, tiles * lanes, lanes], "float32")
        return self._once(
            ("query_bias", bias),
            lambda: self._single(Task("query_bias"), [self._row_major(bias)], out),
        )

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What is the same for several layers, made for the first."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    # Kernels and weights.

    def _kernel(
        self,
        task: Task,
        activations: Sequence[Any],
        weights: Arrays,
        results: Sequence[tuple[Any, Form]],
    ) -> list[Any]:
        """Call a task's kernel; ``results`` are old variables and the forms to give them in."""
        types = [one for var, form in results for one in self.types(var, form)]
        call = self._call(task, activations, weights, types if len(types) > 1 else types[0])
        if len(types) == 1:
            return [call]
        return [self.builder.emit(relax.TupleGetItem(call, i)) for i in range(len(types))]

    def _single(self, task: Task, activations: Sequence[Any], out: relax.TensorType) -> Any:
        """Call a kernel that has no weights, and one result that is not in lanes."""
        return self._call(task, activations, [], out)

    def _call(self, task: Task, activations: Sequence[Any], weights: Arrays, out: Any) -> Any:
        knobs = self.choose(task)
        if task not in self.kernels:
            func = self.schedules[task.operation].kernel(task, knobs, self.row).with_attrs(KERNEL)
            self.kernels[task] = self.builder.add_func(func, task.name)
        self.tasks[task] += 1
        args = [*activations, *self.weights.packed(task, knobs, weights)]
        return self.builder.emit(relax.call_tir(self.kernels[task], args, out_ty=out))

    def _value(self, old: Any) -> tuple[str, np.ndarray]:
        """Name and value of a weight: a parameter, or a constant that a pass made."""
        found = self.flow.definition(old)
        if isinstance(found, relax.Var):
            return found.name, self.graph.params[found.name]
        return f"constant_{next(self.constants)}", found.value.numpy()
