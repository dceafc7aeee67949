"""Says in which forms the activations between fused operators lie, and which tasks follow from
that.

A layer in bfloat16 or bytes reads its input in fewer bits (see ``schedules.cpu.arithmetic``). Who
computes the input writes it so, where nobody else needs more: dense layers and attention instead of
float32, LayerNorm and embedding beside it (the residual connection wants that). What is left is
converted by a kernel of its own (``schedules.cpu.narrow``).
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from tvm import relax

from bertile.graph import ops
from bertile.graph.graph import Graph
from bertile.graph.rewriting.dataflow import Dataflow, shape, variables
from bertile.lower import operators
from bertile.lower.form import FP32, Form
from bertile.numerics.precision import LayerPlan
from bertile.schedules.task import Task


class Forms:
    """What every operator of a graph reads and writes."""

    def __init__(self, graph: Graph) -> None:
        self.plan = graph.plan
        self.flow = Dataflow(graph.main)
        self._wanted: dict[relax.Var, set[Form]] = defaultdict(set)
        for binding in self.flow.bindings:
            for var, form in self._reads(binding.value):
                self._wanted[var].add(form)
        for var in variables(graph.main.body.body):
            self._wanted[var].add(FP32)

    def plan_of(self, call: relax.Call) -> LayerPlan:
        """How a linear layer is computed; what an operator without a plan's weight is: float32."""
        return self.plan.get(self._owner(call), LayerPlan())

    def input(self, call: relax.Call) -> Form:
        """The form in which an operator reads its first operand."""
        return operators.of(call).reads(call, self._owner(call), self.plan_of(call))

    def output(self, var: relax.Var) -> Form:
        """The narrow form that the operator behind ``var`` writes itself, FP32 if it does not."""
        call = self.flow.definition(var)
        operator = operators.of(call)
        narrow = sorted((f for f in self._wanted[var] if f != FP32), key=lambda f: f.kind)
        where = operator.narrows(call) if operator and narrow else ""
        if where != operators.INSTEAD:
            return narrow[0] if where else FP32
        form, alone = narrow[0], self._wanted[var] == {narrow[0]}
        even = operator.unit(call) % form.group == 0
        # the range of a token is known when all its channels are
        return form if alone and even and not self.smooth(form) and not form.ranges else FP32

    def task(self, var: relax.Var) -> Task:
        """What the kernel of the fused operator behind ``var`` computes."""
        call, output = self.flow.definition(var), self.output(var)
        operator = operators.of(call)
        shape = operator.shape(call, self.plan_of(call), output)
        if output != FP32 and operator.narrows(call) == operators.BESIDE:
            shape = {**shape, **self._narrowed(output)}
        return Task(operator.operation(call) or ops.name(call), shape)

    def layout(self, operation: str, value: Any) -> Task:
        """The kernel between a row-major tensor and the same in the form of kernels."""
        return Task(operation, {"channels": shape(value)[-1]})

    def narrow(self, value: Any, form: Form) -> Task:
        """The kernel that writes a value in a narrow form."""
        return Task("narrow", {"channels": shape(value)[-1], **self._narrowed(form)})

    def smooth(self, form: Form) -> bool:
        """Whether a form's values are smoothed before they are quantized."""
        return bool(form.owner) and self.plan[form.owner].smooth is not None

    def _narrowed(self, form: Form) -> dict[str, Any]:
        return {"kind": form.kind, **({"smooth": True} if self.smooth(form) else {})}

    def _owner(self, call: relax.Call) -> str:
        """The name of the parameter that the plan knows an operator by, "" if it has none."""
        weight = self.flow.definition(call.args[1]) if len(call.args) > 1 else None
        return weight.name if isinstance(weight, relax.Var) else ""

    def _reads(self, value: Any) -> list[tuple[relax.Var, Form]]:
        """The variables that an expression reads, each with the form it wants."""
        if not ops.is_ours(value):
            return [(var, FP32) for var in variables(value)]
        forms = [self.input(value), *[FP32] * (len(value.args) - 1)]
        return [(v, form) for arg, form in zip(value.args, forms) for v in variables(arg)]
