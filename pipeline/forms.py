"""In which forms the activations between fused operators lie, and the tasks that follow from that.

A layer in bfloat16 or bytes reads its input in fewer bits (see ``schedules.cpu.arithmetic``). Who
computes the input writes it so, where nobody else needs more: dense layers and attention instead of
float32, LayerNorm and embedding beside it (the residual connection wants that). What is left is
converted by a kernel of its own (``schedules.cpu.narrow``).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from tvm import relax

from bertile import ops
from bertile.graph import Graph
from bertile.passes.rewriting import Dataflow, shape, variables
from bertile.precision import LayerPlan
from bertile.schedules.task import Task


@dataclass(frozen=True)
class Form:
    """``kind`` is "fp32", "bf16", "int8", "int8_static" or "qkv" (bfloat16, V in pairs of tokens).

    ``owner`` names the weight whose plan has the range or the smoothing factors, if there is one.
    """

    kind: str = "fp32"
    owner: str = ""


FP32 = Form()
QKV = Form("qkv")
# Channels that share a lane.
GROUPS = {"fp32": 1, "bf16": 2, "qkv": 2, "int8": 4, "int8_static": 4}


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
        """How a dense layer is computed."""
        weight = self.flow.definition(call.args[1])
        name = weight.name if isinstance(weight, relax.Var) else ""
        return self.plan.get(name, LayerPlan())

    def input(self, call: relax.Call) -> Form:
        """The form in which a dense layer or attention reads its first operand."""
        precision = ops.precision(call)
        if ops.is_call(call, "bertile.attention"):
            return QKV if precision == "bf16" else FP32
        if precision != "int8":
            return Form("bf16") if precision == "bf16" else FP32
        plan = self.plan_of(call)
        owned = plan.static or plan.smooth is not None
        owner = self.flow.definition(call.args[1]).name if owned else ""
        return Form("int8_static" if plan.static else "int8", owner)

    def output(self, var: relax.Var) -> Form:
        """The narrow form that the operator behind ``var`` writes itself, FP32 if it does not."""
        call = self.flow.definition(var)
        narrow = sorted((f for f in self._wanted[var] if f != FP32), key=lambda f: f.kind)
        if not narrow or not ops.is_ours(call):
            return FP32
        if ops.is_call(call, "bertile.layer_norm") or self._normalises(call):
            return narrow[0]
        if not any(ops.is_call(call, f"bertile.{name}") for name in ("dense", "attention")):
            return FP32
        form, alone = narrow[0], self._wanted[var] == {narrow[0]}
        smooth = form.owner and self.plan[form.owner].smooth is not None
        per_token = form.kind == "int8"  # the range is known when all channels are
        even = shape(var)[-1] % GROUPS[form.kind] == 0
        if ops.is_call(call, "bertile.attention"):
            even = ops.attention_spec(call).head_size % GROUPS[form.kind] == 0
        return form if alone and even and not smooth and not per_token else FP32

    def task(self, var: relax.Var) -> Task:
        """What the kernel of the fused operator behind ``var`` computes."""
        call = self.flow.definition(var)
        skips = ops.is_call(call, "bertile.dense") and ops.density(call) is not None
        operation = "sparse" if skips else call.op.name.removeprefix("bertile.")
        return Task(operation, self._shape(call, self.output(var)))

    def layout(self, operation: str, value: Any) -> Task:
        """The kernel between a row-major tensor and the same in the form of kernels."""
        return Task(operation, {"channels": shape(value)[-1]})

    def narrow(self, value: Any, form: Form) -> Task:
        """The kernel that writes a value in a narrow form."""
        smooth = {"smooth": True} if self.smooth(form) else {}
        return Task("narrow", {"channels": shape(value)[-1], "kind": form.kind, **smooth})

    def smooth(self, form: Form) -> bool:
        """Whether a form's values are smoothed before they are quantized."""
        return bool(form.owner) and self.plan[form.owner].smooth is not None

    def _normalises(self, call: relax.Call) -> bool:
        return ops.is_call(call, "bertile.embedding") and len(call.args) > 2 * int(
            call.attrs["tables"]
        )

    def _reads(self, value: Any) -> list[tuple[relax.Var, Form]]:
        """The variables that an expression reads, each with the form it wants."""
        if not ops.is_ours(value):
            return [(var, FP32) for var in variables(value)]
        first = FP32
        if any(ops.is_call(value, f"bertile.{name}") for name in ("dense", "attention")):
            first = self.input(value)
        forms = [first, *[FP32] * (len(value.args) - 1)]
        return [(v, form) for arg, form in zip(value.args, forms) for v in variables(arg)]

    def _shape(self, call: relax.Call, output: Form) -> dict[str, Any]:
        name = call.op.name.removeprefix("bertile.")
        if name == "dense":
            return self._dense(call, output)
        if name == "attention":
            found = ops.attention_spec(call).shape()
            if ops.precision(call) == "bf16":
                found["precision"] = "bf16"
            return found | _writes(output)
        found = {"channels": shape(call)[-1]}
        if name == "rotary":
            return found | {"heads": int(call.attrs["heads"]), "head_size": shape(call.args[1])[-1]}
        if name in ("layer_norm", "embedding"):
            found["epsilon"] = _epsilon(call)
        if name == "embedding":
            count = int(call.attrs["tables"])
            found["ids"] = "_".join(str(a.ty.dtype) for a in call.args[:count])
            found["rows"] = "_".join(str(shape(a)[0]) for a in call.args[count : 2 * count])
            if ops.precision(call) != "fp32":
                found["precision"] = ops.precision(call)
        if output != FP32:
            found["kind"] = output.kind
            if self.smooth(output):
                found["smooth"] = True
        return found

    def _dense(self, call: relax.Call, output: Form) -> dict[str, Any]:
        inputs, outputs = shape(call.args[1])
        found = {
            "inputs": inputs,
            "outputs": outputs,
            "activation": str(call.attrs["activation"]),
            "residual": len(call.args) == 4,
        }
        precision = ops.precision(call)
        if precision != "fp32":
            static = precision == "int8" and self.plan_of(call).static
            found["precision"] = "int8_static" if static else precision
        if output == QKV:
            found |= {"writes": "to_bf16", "values_from": outputs // 3 * 2}
        else:
            found |= _writes(output)
        density = ops.density(call)
        return found if density is None else {**found, "density": density}


def _writes(output: Form) -> dict[str, str]:
    words = {"bf16": "to_bf16", "int8_static": "to_int8"}
    return {"writes": words[output.kind]} if output.kind in words else {}


def _epsilon(call: relax.Call) -> float:
    return float(f"{float(call.attrs['epsilon']):.6g}")  # 9.99999996e-13 in float32 is 1e-12
