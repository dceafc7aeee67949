"""Holds a row for each fused operator: its task, the forms that it reads and writes, its operands.

To add an operator: its type in ``graph.ops``, a row here, and a schedule by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import relax

from bertile.graph import ops
from bertile.graph.rewriting.dataflow import shape
from bertile.lower.dense_weights import Arrays, dense_weights
from bertile.lower.form import FP32, Form
from bertile.numerics.precision import PRECISIONS, LayerPlan
from bertile.schedules.reference import with_bounds
from bertile.schedules.task import Task

Shape = dict[str, Any]
# How an operand is handed to a kernel.
READS = "in the form that the operator reads"
LANES = "as kernels keep float32"
ROWS = "row-major"
KEYS = "a mask, as numbers that are added to the scores of each key"
BIASES = "as numbers that are added to each score"
TABLE = "where the blocks of tokens lie"
# Where a kernel writes a form of fewer bits that others read.
INSTEAD, BESIDE = "instead of float32", "beside float32"
# What an operator's precision is the precision of.
PRODUCTS, TABLES = "its products", "its tables"


def _first_channels(call: relax.Call) -> int:
    return shape(call)[-1]


@dataclass(frozen=True)
class Operator:
    """How one operator becomes a call of a kernel. Of a call it says:

    `shape`, its task's, of the call, its layer's plan and the form it writes; `operands`, each with
    how it is handed over, but for `weights`; `arrays`, the kernel's weights, of the task, their
    names and values, and the plan; `reads`, the form of the first operand; `narrows`, where it
    writes fewer bits ("" where it cannot); `unit`, the channels that it writes together;
    `operation`, whose schedule computes it, its own where None. `precision` says of what one is
    chosen, "" where none is. With `leaves` the result is row-major.
    """

    shape: Callable[[relax.Call, LayerPlan, Form], Shape]
    operands: Callable[[relax.Call], Sequence[tuple[str, Any]]]
    weights: Callable[[relax.Call], Sequence[Any]] = lambda call: ()
    arrays: Callable[[Task, Arrays, LayerPlan], Arrays] = lambda task, values, plan: values
    reads: Callable[[relax.Call, str, LayerPlan], Form] = lambda call, owner, plan: FP32
    narrows: Callable[[relax.Call], str] = lambda call: ""
    unit: Callable[[relax.Call], int] = _first_channels
    operation: Callable[[relax.Call], str | None] = lambda call: None
    precision: str = ""
    leaves: bool = False


def of(value: Any) -> Operator | None:
    """The row of an operator of ours; None of anything else."""
    return OPERATORS[ops.name(value)] if ops.is_ours(value) else None


# dense


def _dense_shape(call: relax.Call, plan: LayerPlan, output: Form) -> Shape:
    inputs, outputs = shape(call.args[1])
    task = {
        "inputs": inputs,
        "outputs": outputs,
        "activation": str(call.attrs["activation"]),
        "residual": len(call.args) == 4,
        **({"gated": True} if ops.is_gated(call) else {}),
        **_turned(call),
        **_of_products(call, plan),
        **({"group": plan.group} if PRECISIONS[ops.precision(call)].groups else {}),
        **output.writes,
    }
    density = ops.density(call)
    return task if density is None else {**task, "density": density}


def _turned(call: relax.Call) -> Shape:
    """What a task says of heads that have rotary positions; nothing where there are none."""
    heads = ops.turned(call)
    return {"turned": heads, "head_size": shape(call.args[-1])[-1]} if heads else {}


def _dense_reads(call: relax.Call, owner: str, plan: LayerPlan) -> Form:
    precision = ops.precision(call)
    if not PRECISIONS[precision].quantized:
        return Form("bf16") if precision == "bf16" else FP32
    owned = plan.static or plan.smooth is not None
    return Form("int8_static" if plan.static else "int8", owner if owned else "")


# attention


def _attention_shape(call: relax.Call, plan: LayerPlan, output: Form) -> Shape:
    halves = {"precision": "bf16"} if ops.precision(call) == "bf16" else {}
    return {**ops.attention_spec(call).shape(), **halves, **output.writes}


def _attention_reads(call: relax.Call, owner: str, plan: LayerPlan) -> Form:
    q, k, _ = ops.attention_spec(call).channels()
    return Form("qkv", values_from=q + k) if ops.precision(call) == "bf16" else FP32


def _attention_operands(call: relax.Call) -> list[tuple[str, Any]]:
    qkv, mask, *rest = call.args
    bias = rest[:1] if ops.attention_spec(call).bias == "tensor" else []
    return [(READS, qkv), (KEYS, mask), (TABLE, None), *((BIASES, each) for each in bias)]


def _attention_weights(call: relax.Call) -> list[Any]:
    tables, rows = ops.attention_tables(call)
    return [*tables, rows] if tables else []


def _attention_arrays(task: Task, values: Arrays, plan: LayerPlan) -> Arrays:
    """The tables (1, H, D, 2 last + 1) with a vector for each distance."""
    *tables, rows = values or [None]
    return [(name, table[..., rows[1]]) for name, table in tables]


# The others.


def _rotary_shape(call: relax.Call, plan: LayerPlan, output: Form) -> Shape:
    heads, size = int(call.attrs["heads"]), shape(call.args[1])[-1]
    norm = {"epsilon": _epsilon(call)} if len(call.args) > 3 else {}
    channels = shape(call)[-1]
    return {"channels": channels, "heads": heads, "head_size": size, **norm, **output.writes}


def _layer_norm_shape(call: relax.Call, plan: LayerPlan, output: Form) -> Shape:
    more = {"rms": True} if ops.is_rms(call) else {}
    return {"channels": shape(call)[-1], "epsilon": _epsilon(call), **more}


def _embedding_shape(call: relax.Call, plan: LayerPlan, output: Form) -> Shape:
    count = _tables(call)
    return {
        **_layer_norm_shape(call, plan, output),
        "ids": "_".join(str(ids.ty.dtype) for ids in call.args[:count]),
        "rows": "_".join(str(shape(table)[0]) for table in call.args[count : 2 * count]),
        **_precision(call),
    }


def _embedding_operands(call: relax.Call) -> list[tuple[str, Any]]:
    return [*((ROWS, ids) for ids in call.args[: _tables(call)]), (TABLE, None)]


def _embedding_narrows(call: relax.Call) -> str:
    return BESIDE if len(call.args) > 2 * _tables(call) else ""  # where it ends in a LayerNorm


def _tables(call: relax.Call) -> int:
    return int(call.attrs["tables"])


def _of_products(call: relax.Call, plan: LayerPlan) -> dict[str, str]:
    """What a linear layer's task says of its precision, and of its bytes."""
    own = _precision(call)
    if own.get("precision") != "int8":
        return own
    precision = "int8_static" if plan.static else "int8"
    bounded = ops.density(call) is None and plan.bounded is not None
    return {"precision": with_bounds(precision) if bounded else precision}


def _precision(call: relax.Call) -> dict[str, str]:
    """What a task says of its precision; nothing of float32."""
    precision = ops.precision(call)
    return {} if precision == "fp32" else {"precision": precision}


def _epsilon(call: relax.Call) -> float:
    return float(f"{float(call.attrs['epsilon']):.6g}")  # 9.99999996e-13 in float32 is 1e-12


OPERATORS: Mapping[str, Operator] = {
    "dense": Operator(
        shape=_dense_shape,
        operands=lambda call: [(READS, call.args[0]), *((LANES, r) for r in call.args[3:])],
        weights=lambda call: call.args[1:3],
        arrays=dense_weights,
        reads=_dense_reads,
        narrows=lambda call: INSTEAD,
        operation=lambda call: None if ops.density(call) is None else "sparse",
        precision=PRODUCTS,
    ),
    "attention": Operator(
        shape=_attention_shape,
        operands=_attention_operands,
        weights=_attention_weights,
        arrays=_attention_arrays,
        reads=_attention_reads,
        narrows=lambda call: INSTEAD,
        unit=lambda call: ops.attention_spec(call).head_size,
        precision=PRODUCTS,
    ),
    "rotary": Operator(
        shape=_rotary_shape,
        # cos and sin once for all layers
        operands=lambda call: [(LANES, x) for x in call.args[:3]],
        weights=lambda call: call.args[3:],
        narrows=lambda call: INSTEAD,
    ),
    "layer_norm": Operator(
        shape=_layer_norm_shape,
        operands=lambda call: [(LANES, call.args[0])],
        weights=lambda call: call.args[1:],
        narrows=lambda call: BESIDE,
    ),
    "embedding": Operator(
        shape=_embedding_shape,
        operands=_embedding_operands,
        weights=lambda call: call.args[_tables(call) :],
        narrows=_embedding_narrows,
        precision=TABLES,
    ),
    "first_token": Operator(
        shape=lambda call, plan, output: {"channels": shape(call)[-1]},
        operands=lambda call: [(LANES, call.args[0]), (TABLE, None)],
        leaves=True,
    ),
}
