"""From fused operators to kernels: chooses layouts, packs weights, calls one PrimFunc per task.

    bertile.dense(x (B, S, K), w, b)  →  call_tir(dense_K_N, [x (m, K, 16), w packed, b packed])

What our operators hand to each other stays in lanes; a conversion stands only where another
operator, or
the caller, reads or writes a row-major tensor.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax

from bertile import ops
from bertile.graph import Graph
from bertile.importer import TABLE
from bertile.passes.rewriting import Dataflow, shape
from bertile.schedules.cpu import SCHEDULES
from bertile.schedules.cpu.generic import KERNEL
from bertile.schedules.schedule import Knobs
from bertile.schedules.task import Task
from bertile.targets import Target

Choice = Callable[[Task], Knobs]


@dataclass(frozen=True)
class Lowered:
    """A module of kernel calls; ``params`` are its packed weights, in the order of main's
    parameters.
    """

    mod: tvm.IRModule
    params: dict[str, np.ndarray]
    tasks: Counter[Task]
    fallthrough: list[str]  # operators that no schedule of ours covers, as Relax names them


def task_of(call: relax.Call) -> Task:
    """What the kernel of a fused operator computes."""
    name = call.op.name.removeprefix("bertile.")
    if name == "dense":
        inputs, outputs = shape(call.args[1])
        activation, residual = str(call.attrs["activation"]), len(call.args) == 4
        return Task(
            name, _shape(inputs=inputs, outputs=outputs, activation=activation, residual=residual)
        )
    if name == "attention":
        attrs = call.attrs
        return Task(
            name,
            _shape(
                heads=int(attrs["heads"]),
                head_size=int(attrs["head_size"]),
                scale=_scale(float(attrs["scale"]), int(attrs["head_size"])),
                bias=len(call.args) == 3,
            ),
        )
    channels = shape(call)[-1]
    if name == "layer_norm":
        return Task(name, _shape(channels=channels, epsilon=_epsilon(call)))
    if name == "embedding":
        count = int(call.attrs["tables"])
        ids = "_".join(str(a.ty.dtype) for a in call.args[:count])
        rows = "_".join(str(shape(a)[0]) for a in call.args[count : 2 * count])
        return Task(name, _shape(channels=channels, epsilon=_epsilon(call), ids=ids, rows=rows))
    return Task(name, _shape(channels=channels))


def tasks(graph: Graph) -> Counter[Task]:
    """The tasks of a graph's fused operators, with how often each is called."""
    flow = Dataflow(graph.main)
    return Counter(task_of(b.value) for b in flow.bindings if ops.is_ours(b.value))


def lower(graph: Graph, row: Target, choose: Choice) -> Lowered:
    """Replace every fused operator by its kernel, with the knobs that ``choose`` gives for its
    task.
    """
    return _Lowering(graph, row, choose).run()


def _shape(**values: Any) -> dict[str, Any]:
    return values


def _scale(value: float, head_size: int) -> float:
    """Exporters round 1/√D differently; kernels that are the same must have the same key."""
    usual = head_size**-0.5
    return usual if math.isclose(value, usual, rel_tol=1e-6) else value


def _epsilon(call: relax.Call) -> float:
    return float(f"{float(call.attrs['epsilon']):.6g}")  # 9.99999996e-13 in float32 is 1e-12


class _Lowering:
    def __init__(self, graph: Graph, row: Target, choose: Choice) -> None:
        self.graph, self.row, self.choose = graph, row, choose
        self.flow = Dataflow(graph.main)
        self.builder = relax.BlockBuilder()
        self.inputs = list(graph.main.params[: int(graph.main.attrs["num_input"])])
        self.table = next(p for p in self.inputs if p.name == TABLE)
        self.weights: dict[str, relax.Var] = {}  # new parameters by name
        self.values: dict[str, np.ndarray] = {}
        self.constants = itertools.count()  # constants have no names of their own
        self.rows: dict[relax.Var, Any] = {p: p for p in self.inputs}  # old variable → row-major
        self.lanes: dict[relax.Var, Any] = {}  # old variable → in lanes
        self.shared: dict[tuple[str, Any], Any] = {}  # masks and biases, made once for all layers
        self.kernels: dict[Task, tvm.ir.GlobalVar] = {}
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
        params = [*self.inputs, *self.weights.values()]
        mod["main"] = relax.Function(params, main.body, main.ret_ty, True).with_attr(
            {"global_symbol": "main", "num_input": len(self.inputs)}
        )
        return Lowered(mod, self.values, self.tasks, self.fallthrough)

    def _binding(self, var: relax.Var, value: Any) -> None:
        if ops.is_ours(value):
            getattr(self, "_" + value.op.name.removeprefix("bertile."))(var, value)
        elif isinstance(value, relax.Var) and value in self.lanes:
            self.lanes[var] = self.lanes[value]
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
        activations = [self._in_lanes(a) for a in (x, *residual)]
        self.lanes[var] = self._kernel(task_of(call), activations, [w, b], self._lanes_type(call))

    def _layer_norm(self, var: relax.Var, call: relax.Call) -> None:
        x, *norm = call.args
        self.lanes[var] = self._kernel(
            task_of(call), [self._in_lanes(x)], norm, self._lanes_type(call)
        )

    def _attention(self, var: relax.Var, call: relax.Call) -> None:
        qkv, mask, *bias = call.args
        activations = [self._in_lanes(qkv), self._keys(mask), self.table]
        activations += [self._biases(b) for b in bias]
        self.lanes[var] = self._kernel(task_of(call), activations, [], self._lanes_type(call))

    def _embedding(self, var: relax.Var, call: relax.Call) -> None:
        count = int(call.attrs["tables"])
        ids = [self._row_major(i) for i in call.args[:count]]
        self.lanes[var] = self._kernel(
            task_of(call), [*ids, self.table], call.args[count:], self._lanes_type(call)
        )

    def _first_token(self, var: relax.Var, call: relax.Call) -> None:
        activations = [self._in_lanes(call.args[0]), self.table]
        self.rows[var] = self._kernel(task_of(call), activations, [], call.ty)

    # Layouts.

    def _lanes_type(self, call: Any) -> relax.TensorType:
        """The type in lanes of a (B, S, C) or (N, C) tensor."""
        *outer, channels = shape(call)
        lanes = self.row.lanes
        blocks = self.table.ty.shape[0] if len(outer) == 2 else (outer[0] + (lanes - 1)) // lanes
        return relax.TensorType([blocks, channels, lanes], "float32")

    def _in_lanes(self, old: Any) -> Any:
        """The value of an old variable in lanes, converted at its first use."""
        if old not in self.lanes:
            tokens = len(shape(old)) == 3
            task = Task("tokens_in" if tokens else "rows_in", _shape(channels=shape(old)[-1]))
            operands = [self._row_major(old)] + ([self.table] if tokens else [])
            self.lanes[old] = self._kernel(task, operands, [], self._lanes_type(old))
        return self.lanes[old]

    def _row_major(self, expr: Any) -> Any:
        """An old expression with its variables replaced by new row-major ones."""
        if isinstance(expr, relax.Var):
            if expr in self.rows:
                return self.rows[expr]
            if expr in self.lanes:
                return self._out_of_lanes(expr)
            if expr in self.flow.weights:
                return self._weight(expr.name, self.graph.params[expr.name])
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
        task = Task("tokens_out" if tokens else "rows_out", _shape(channels=shape(old)[-1]))
        operands = [self.lanes[old]] + ([self.table] if tokens else [])
        self.rows[old] = self._kernel(task, operands, [], old.ty)
        return self.rows[old]

    def _keys(self, mask: Any) -> Any:
        blocks = self.table.ty.shape[0]
        out = relax.TensorType([blocks, self.row.lanes], "float32")
        return self._once("key_mask", mask, lambda x: ([x, self.table], out))

    def _biases(self, bias: Any) -> Any:
        rows, heads, length, _ = bias.ty.shape
        tiles = (length + (self.row.lanes - 1)) // self.row.lanes
        lanes = self.row.lanes
        out = relax.TensorType([rows, heads, tiles, tiles * lanes, lanes], "float32")
        return self._once("query_bias", bias, lambda x: ([x], out))

    def _once(self, operation: str, old: Any, operands: Callable[[Any], tuple[list, Any]]) -> Any:
        if (operation, old) not in self.shared:
            args, out = operands(self._row_major(old))
            self.shared[operation, old] = self._kernel(Task(operation), args, [], out)
        return self.shared[operation, old]

    # Kernels and weights.

    def _kernel(
        self, task: Task, activations: Sequence[Any], weights: Sequence[Any], out: relax.TensorType
    ) -> Any:
        schedule, knobs = SCHEDULES[task.operation], self.choose(task)
        if task not in self.kernels:
            func = schedule.kernel(task, knobs, self.row).with_attrs(KERNEL)
            self.kernels[task] = self.builder.add_func(func, task.name)
        self.tasks[task] += 1
        args = [*activations, *self._packed(task, knobs, weights)]
        return self.builder.emit(relax.call_tir(self.kernels[task], args, out_ty=out))

    def _packed(self, task: Task, knobs: Knobs, weights: Sequence[Any]) -> list[Any]:
        if not weights:
            return []
        names, values = zip(*(self._value(w) for w in weights))
        packed = SCHEDULES[task.operation].pack(task, knobs, values)
        packing = "" if all(a is b for a, b in zip(packed, values)) else f"@{task.name}"
        return [self._weight(f"{n}{packing}", v) for n, v in zip(names, packed)]

    def _value(self, old: Any) -> tuple[str, np.ndarray]:
        """Name and value of a weight: a parameter, or a constant that a pass made."""
        found = self.flow.definition(old)
        if isinstance(found, relax.Var):
            return found.name, self.graph.params[found.name]
        return f"constant_{next(self.constants)}", found.value.numpy()

    def _weight(self, name: str, value: np.ndarray) -> relax.Var:
        if name not in self.weights:
            self.weights[name] = relax.Var(
                name, relax.TensorType(list(value.shape), str(value.dtype))
            )
            self.values[name] = value
        return self.weights[name]
