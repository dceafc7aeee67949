"""Replaces each fused operator by the call of a kernel: one task, its packed weights, its operands.

    bertile.dense(x (B, S, K), w, b)  →  call of dense_K_N with [x as it lies, w packed, b packed]

How activations lie and how a kernel is called differs between kinds of machine: each backend says
so in a class of its own. What our operators hand to each other stays in the backend's form; a
conversion stands only where another operator, or the caller, reads or writes a row-major tensor.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm
from tvm import relax

from bertile.graph import ops
from bertile.graph.graph import Graph
from bertile.graph.importer import TABLE
from bertile.graph.rewriting.dataflow import shape
from bertile.lower import operators
from bertile.lower.dense_weights import Arrays, narrowing
from bertile.lower.form import FP32, Form
from bertile.lower.forms import Forms
from bertile.lower.packed_weights import PackedWeights
from bertile.lower.stages import Stage, StageEntry
from bertile.schedules import schedules_for
from bertile.schedules.schedule import Knobs
from bertile.schedules.task import Task
from bertile.targets.rows import Target

Choice = Callable[[Task], Knobs]


@dataclass(frozen=True)
class Lowered:
    """A module of kernel calls; ``params`` are its packed weights, in the order of main's
    parameters.

    ``kernels`` are those of a GPU, by their names; those of a CPU are functions of ``mod``.
    ``nonzeros`` counts the lanes of the weights that all calls of a sparse task read together,
    ``fallthrough`` are operators that no schedule of ours covers, as Relax names them. ``stages``
    are the functions beside main; the counts are of main alone.
    """

    mod: tvm.IRModule
    params: dict[str, np.ndarray]
    tasks: Counter[Task]
    nonzeros: Counter[Task]
    fallthrough: list[str]
    kernels: Mapping[str, Any] = field(default_factory=dict)
    stages: Sequence[StageEntry] = ()


def tasks(forms: Forms) -> Counter[Task]:
    """The tasks of a graph's fused operators, with how often each is called."""
    return Counter(forms.task(b.var) for b in forms.flow.bindings if ops.is_ours(b.value))


class Lowering(ABC):
    """Walks one graph and calls kernels; a backend says how values lie and kernels are called."""

    def __init__(self, graph: Graph, forms: Forms, row: Target, choose: Choice) -> None:
        self.whole, self.row, self.choose = graph, row, choose
        self.schedules = schedules_for(row)
        self.builder = relax.BlockBuilder()
        self.weights = PackedWeights(row)
        self.constants: dict[Any, str] = {}  # which have no names of their own
        self.kernels: dict[Task, Any] = {}  # what the backend calls, made at a task's first use
        self._enter(graph, forms)

    def _enter(self, graph: Graph, forms: Forms, states: Sequence[relax.Var] = ()) -> None:
        """Begin with a function; `states` are those of its inputs that come in lanes."""
        self.graph, self.forms, self.flow = graph, forms, forms.flow
        inputs = list(graph.main.params[: int(graph.main.attrs["num_input"])])
        self.table = next(p for p in inputs if p.name == TABLE)
        handed = {p: relax.Var(p.name, self.types(p, FP32)[0]) for p in states}
        self.inputs = [handed.get(p, p) for p in inputs]
        # old variable → row-major
        self.rows: dict[relax.Var, Any] = {p: p for p in inputs if p not in handed}
        # old variable, form → as kernels read it
        self.lanes: dict[tuple[relax.Var, Form], list[Any]] = {
            (old, FP32): [new] for old, new in handed.items()
        }
        self.shared: dict[Any, Any] = {}  # masks, biases and weights that several layers share
        self.tasks: Counter[Task] = Counter()
        self.fallthrough: list[str] = []

    def run(self, stages: Sequence[Stage] = ()) -> Lowered:
        """The whole graph as the function "main", and its stages as functions beside it, on the
        same weights.
        """
        self._function("main")
        tasks, nonzeros, fallthrough = self.tasks, Counter(self.weights.nonzeros), self.fallthrough
        inputs = {"main": self.inputs}
        for number, stage in enumerate(stages, 1):
            self._enter(stage.graph, type(self.forms)(stage.graph), stage.states)
            self._function(f"stage_{number}", stage.gives)
            inputs[f"stage_{number}"] = self.inputs
        mod, weights = self.builder.finalize(), self.weights
        for name, func in self.whole.mod.functions.items():
            if name.name_hint != "main":  # the importer wrote some operators (Clip) as loops
                mod[name] = func
        mod["main"] = _called(mod, "main", inputs.pop("main"), weights.variables.values())
        entries = []
        for stage, (name, own) in zip(stages, inputs.items()):
            free = set(relax.analysis.free_vars(mod[name]))
            used = [var for var in weights.variables.values() if var in free]
            # a module has no variable twice
            mod[name] = relax.utils.copy_with_new_vars(_called(mod, name, own, used))
            entries.append(StageEntry(name, len(stage.states), [var.name for var in used]))
        kernels = {task.name: kernel for task, kernel in self.kernels.items()}
        return Lowered(mod, weights.values, tasks, nonzeros, fallthrough, kernels, entries)

    def _function(self, name: str, states: int = 0) -> None:
        """Write the function that was entered; the first of its results are states, in lanes."""
        with self.builder.function(name, self.inputs):
            with self.builder.dataflow():
                for binding in self.flow.bindings:
                    self._binding(binding.var, binding.value)
                result = self.flow.definition(self.graph.main.body.body)
                fields = (
                    result.fields
                    if isinstance(result, relax.Tuple)
                    else [self.graph.main.body.body]
                )
                values = [self._in_lanes(field) for field in fields[:states]]
                values += [self._row_major(field) for field in fields[states:]]
                output = self.builder.emit_output(relax.Tuple(values))
            self.builder.emit_func_output(output)

    def _binding(self, var: relax.Var, value: Any) -> None:
        if operator := operators.of(value):
            self._operator(var, value, operator)
        elif isinstance(value, relax.Var) and (value, FP32) in self.lanes:
            self.lanes[var, FP32] = self.lanes[value, FP32]
        elif not (var.same_as(self.graph.main.body.body) and isinstance(value, relax.Tuple)):
            self._generic(var, value)  # the tuple of results is emitted at the end

    def _operator(self, var: relax.Var, call: relax.Call, operator: operators.Operator) -> None:
        """Call the kernel of one of our operators, as its row says."""
        task, output = self.forms.task(var), self.forms.output(var)
        handed = [self._handed(how, value, call) for how, value in operator.operands(call)]
        activations = list(itertools.chain.from_iterable(handed))
        if operator.leaves:
            self.rows[var] = self._single(task, activations, call.ty)
            return
        weights = operator.weights(call)
        arrays = self._once(
            ("weights", *weights, task),
            lambda: operator.arrays(task, [*map(self._value, weights)], self.forms.plan_of(call)),
        )
        beside = operator.narrows(call) == operators.BESIDE and output != FP32
        forms = [FP32, output] if beside else [output]
        arrays = [*arrays, *narrowing(output, self.graph.plan)]
        self._kernel(task, activations, arrays, [(var, form) for form in forms])

    def _handed(self, how: str, value: Any, call: relax.Call) -> list[Any]:
        """An operand in the way that a kernel reads it (see ``operators``)."""
        ways: dict[str, Callable[[], list[Any]]] = {
            operators.READS: lambda: self._in_form(value, self.forms.input(call)),
            operators.LANES: lambda: [self._in_lanes(value)],
            operators.ROWS: lambda: [self._row_major(value)],
            operators.KEYS: lambda: [self._keys(value)],
            operators.BIASES: lambda: [self._biases(value)],
            operators.TABLE: lambda: [self.table],
        }
        return ways[how]()

    def _generic(self, var: relax.Var, value: Any) -> None:
        """An operator that is not ours, on row-major operands."""
        self.rows[var] = self.builder.emit(self._row_major(value), var.name)
        if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op):
            is_loops = ops.is_call(value, "relax.call_tir")
            name = value.args[0].name_hint if is_loops else value.op.name.removeprefix("relax.")
            self.fallthrough.append(f"{name} ({var.name})")

    # What a backend says.

    @abstractmethod
    def types(self, old: Any, form: Form) -> list[relax.TensorType]:
        """The types that a (B, S, C) or (N, C) tensor has in a form."""

    @abstractmethod
    def _keys(self, mask: Any) -> Any:
        """What attention adds to the scores of each key, of a (B, 1, 1, S) mask."""

    @abstractmethod
    def _biases(self, bias: Any) -> Any:
        """What attention adds to each score, of a (B, H, S, S) bias."""

    @abstractmethod
    def _call(self, task: Task, activations: Sequence[Any], weights: Arrays, out: Any) -> Any:
        """Call the kernel of a task, made at its first use."""

    # Layouts.

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
        self._kernel(task, operands, weights, [(old, form)])
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
    ) -> None:
        """Call a task's kernel; ``results`` are old variables, with the forms to give them in."""
        types = [self.types(var, form) for var, form in results]
        flat = list(itertools.chain.from_iterable(types))
        call = self._call(task, activations, weights, flat if len(flat) > 1 else flat[0])
        places = iter(range(len(flat)))
        for (var, form), parts in zip(results, types):
            self.lanes[var, form] = [self._part(call, next(places), len(flat)) for _ in parts]

    def _part(self, call: Any, place: int, count: int) -> Any:
        """One of the tensors that a kernel gives."""
        return self.builder.emit(relax.TupleGetItem(call, place)) if count > 1 else call

    def _single(self, task: Task, activations: Sequence[Any], out: relax.TensorType) -> Any:
        """Call a kernel that has no weights, and one result that is not in lanes."""
        return self._call(task, activations, [], out)

    def _value(self, old: Any) -> tuple[str, np.ndarray]:
        """Name and value of a weight: a parameter, or a constant that a pass made."""
        weight = self.flow.definition(old)
        if isinstance(weight, relax.Var):
            return weight.name, self.graph.params[weight.name]
        name = self.constants.setdefault(weight, f"constant_{len(self.constants)}")
        return name, weight.value.numpy()


def _called(mod: Any, name: str, inputs: Sequence[relax.Var], weights: Iterable[relax.Var]) -> Any:
    """A function of a module with weights as parameters behind its inputs."""
    func = mod[name]
    attrs = {"global_symbol": name, "num_input": len(inputs)}
    return relax.Function([*inputs, *weights], func.body, func.ret_ty, True).with_attr(attrs)
