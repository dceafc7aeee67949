"""Defines the operators that graph passes fuse into, as Relax operators of their own. All are pure
and act on row-major tensors; the layout that kernels use enters only when the builder lowers them.

    bertile.dense(x (…, K), w (K, N), b (N), [residual (…, N)]) {activation, [precision], [density]}
        = activation(x w + b) + residual
        {gated}: of w (K, 2 N), activation(the first N outputs) · the others, and no residual
        (…, cos (B|1, S, D), sin (B|1, S, D)) {turned}: that many of the first heads of D channels
        turned by the places of tokens, as by bertile.rotary
    bertile.attention(qkv (B, S, 3 H D), mask (B|1, 1, 1, S), [bias (B|1, H|1, S, S)]) {heads,
    head_size, scale, [precision]} and what else an AttentionSpec says that is not its default
        (…, [keys by distance (1, H, D, R)], [queries by distance (1, H, D, R)], rows (2 last + 1)):
        weights, and which of their R rows each distance query - key from -last to last has
    bertile.rotary(x (B, S, C), cos (B|1, S, D), sin (B|1, S, D), [gamma (heads D)]) {heads,
    [epsilon]}
        its first heads of D channels turned by the places of tokens, the rest as it is; with gamma
        each of those heads is RMSNorm's of itself before
    bertile.layer_norm(x (…, C), gamma (C), beta (C)) {epsilon, [rms]}
        {rms}: RMSNorm, x by the root of its mean square
    bertile.embedding(ids (B|1, S)…, table (V, C)…, gamma (C), beta (C)) {tables, epsilon,
    [precision]}
    bertile.first_token(x (B, S, C))                                                   x[:, 0]
    bertile.fake_quantize(x) {low, high, dynamic}                                            x
        as a quantized model rounds it; no kernel has it: passes.collect_quantization takes it out
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import tvm
from tvm import relax
from tvm.ir import _ffi_api
from tvm.ir.op import register_op_attr

from bertile.schedules.attention_spec import AttentionSpec


def dense(x: Any, w: Any, b: Any, residual: Any = None, activation: str = "none") -> relax.Call:
    """activation(x w + b) + residual; activations as in ``schedules.cpu.vector_math``."""
    operands = [x, w, b] if residual is None else [x, w, b, residual]
    return _call("dense", operands, activation=activation)


def gated_dense(x: Any, w: Any, b: Any, activation: str) -> relax.Call:
    """The first half of the channels of x w + b, activated, times the second."""
    return _call("dense", [x, w, b], activation=activation, gated=True)


def turned_dense(x: Any, w: Any, b: Any, cos: Any, sin: Any, heads: int) -> relax.Call:
    """x w + b, of which the first heads have the rotary positions of their tokens."""
    return _call("dense", [x, w, b, cos, sin], activation="none", turned=heads)


def is_gated(call: relax.Call) -> bool:
    """Whether a dense layer multiplies the two halves of its channels."""
    return "gated" in call.attrs


def turned(call: relax.Call) -> int:
    """How many of the first heads of a dense layer have rotary positions."""
    return int(call.attrs["turned"]) if "turned" in call.attrs else 0


def with_turned(call: relax.Call, heads: int) -> relax.Call:
    """The same dense layer with so many heads that have rotary positions."""
    return _with(call, turned=heads)


def angles(call: relax.Call) -> list[Any]:
    """cos and sin that one of our operators turns heads by; none where it turns none."""
    if name(call) == "rotary":
        return list(call.args[1:3])
    return list(call.args[3:5]) if name(call) == "dense" and turned(call) else []


def attention(spec: AttentionSpec, *operands: Any) -> relax.Call:
    """What ``spec`` describes, of its operands; heads side by side as they came."""
    if len(operands) != len(spec.operands()):
        raise ValueError(f"{len(operands)} operands came for {', '.join(spec.operands())}")
    return _call("attention", operands, **_attributes(spec))


def attention_spec(call: relax.Call) -> AttentionSpec:
    """What an attention computes."""
    attrs = {name: call.attrs[name] for name in call.attrs.keys()}
    spec = AttentionSpec.from_shape({"bias": False, **attrs})
    biases = len(call.args) - len(spec.operands())
    return dataclasses.replace(spec, bias="tensor") if biases else spec


def attention_tables(call: relax.Call) -> tuple[list[Any], Any]:
    """The tables by distance of an attention and their rows; nothing and None where it has none."""
    count = len(attention_spec(call).tables())
    return (list(call.args[-1 - count : -1]), call.args[-1]) if count else ([], None)


def rotary(
    x: Any, cos: Any, sin: Any, heads: int, gamma: Any = None, epsilon: float = 0.0
) -> relax.Call:
    """Channels d and d + D / 2 of each of the first heads turned by the angle of their token; each
    head by RMSNorm before, where there is a gamma for their channels.
    """
    if gamma is None:
        return _call("rotary", [x, cos, sin], heads=heads)
    return _call("rotary", [x, cos, sin, gamma], heads=heads, epsilon=epsilon)


def layer_norm(x: Any, gamma: Any, beta: Any, epsilon: float, rms: bool = False) -> relax.Call:
    """LayerNorm over the last axis, or RMSNorm, where the mean is not taken off."""
    more = {"rms": True} if rms else {}
    return _call("layer_norm", [x, gamma, beta], epsilon=epsilon, **more)


def is_rms(norm: relax.Call) -> bool:
    """Whether a norm is RMSNorm."""
    return "rms" in norm.attrs


def embedding(
    ids: Sequence[Any], tables: Sequence[Any], norm: Sequence[Any], epsilon: float
) -> Any:
    """The sum of ``table[ids]``, normalised where ``norm`` (gamma, beta) is given."""
    return _call("embedding", [*ids, *tables, *norm], tables=len(tables), epsilon=epsilon)


def first_token(x: Any) -> relax.Call:
    """The first token of each sequence."""
    return _call("first_token", [x])


def precision(call: relax.Call) -> str:
    """What a dense layer or attention multiplies in; float32 where nothing is said."""
    return str(call.attrs["precision"]) if call.attrs and "precision" in call.attrs else "fp32"


def with_precision(call: relax.Call, precision: str) -> relax.Call:
    """The same call in another precision."""
    return _with(call, precision=precision)


def density(call: relax.Call) -> int | None:
    """Of a dense layer that skips zeros, the percent of lanes that are left; None of another."""
    return int(call.attrs["density"]) if "density" in call.attrs else None


def with_density(call: relax.Call, percent: int) -> relax.Call:
    """The same dense layer, its weights stored without the lanes that are zero."""
    return _with(call, density=percent)


def with_spec(call: relax.Call, spec: AttentionSpec, qkv: Any) -> relax.Call:
    """The same attention of another kind and other channels, in the same precision."""
    other = attention(spec, qkv, *call.args[1:])
    return with_precision(other, precision(call)) if "precision" in call.attrs else other


def fake_quantize(x: Any, low: float | None = None, high: float | None = None) -> relax.Call:
    """x rounded to 256 numbers from low to high, or from the smallest to the largest of each token
    where these are not given.
    """
    dynamic = low is None or high is None
    low, high = (0.0, 0.0) if dynamic else (low, high)
    return _call("fake_quantize", [x], low=low, high=high, dynamic=dynamic)


def is_call(expr: Any, name: str) -> bool:
    """Whether ``expr`` is a call of the operator ``name`` (Relax's are spelled ``relax.add``)."""
    return isinstance(expr, relax.Call) and isinstance(expr.op, tvm.ir.Op) and expr.op.name == name


def is_ours(expr: Any) -> bool:
    """Whether ``expr`` is a call of an operator of this module."""
    return (
        isinstance(expr, relax.Call)
        and isinstance(expr.op, tvm.ir.Op)
        and expr.op.name.startswith("bertile.")
    )


def name(call: relax.Call) -> str:
    """The name of an operator of this module, without the prefix."""
    return call.op.name.removeprefix("bertile.")


def _call(name: str, operands: Sequence[Any], **attrs: Any) -> relax.Call:
    node = tvm.ir.make_node("ir.DictAttrs", **attrs) if attrs else None
    return relax.Call(tvm.ir.Op.get(f"bertile.{name}"), list(operands), attrs=node)


def _with(call: relax.Call, **values: Any) -> relax.Call:
    """The same call with some attributes set, and the others as they were."""
    attrs = {name: call.attrs[name] for name in call.attrs.keys()}
    node = tvm.ir.make_node("ir.DictAttrs", **{**attrs, **values})
    return relax.Call(call.op, list(call.args), attrs=node)


def _attributes(spec: AttentionSpec) -> dict[str, Any]:
    """A spec as attributes; whether there is a bias is told by the operands."""
    return {name: value for name, value in spec.shape().items() if not isinstance(value, bool)}


def _like(x: Any, *last: Any) -> relax.TensorType:
    """The type of ``x`` with other last extents."""
    extents = list(x.ty.shape)
    return relax.TensorType([*extents[: len(extents) - len(last)], *last], x.ty.dtype)


def _embedding_type(call: relax.Call, _context: Any) -> relax.TensorType:
    count = int(call.attrs["tables"])
    ids, table = call.args[:count], call.args[count]
    # positions come as (1, S), and a fixed token type as (1, 1)
    columns = zip(*(index.ty.shape for index in ids))
    extents = [next((e for e in column if not _is_one(e)), column[0]) for column in columns]
    return relax.TensorType([*extents, table.ty.shape[1]], table.ty.dtype)


def _dense_type(call: relax.Call, _context: Any) -> relax.TensorType:
    outputs = call.args[1].ty.shape[1]
    return _like(call.args[0], outputs // 2 if is_gated(call) else outputs)


def _is_one(extent: Any) -> bool:
    return isinstance(extent, tvm.tirx.IntImm) and int(extent) == 1


def _attention_type(call: relax.Call, _context: Any) -> relax.TensorType:
    return _like(call.args[0], attention_spec(call).channels()[0])


def _first_token_type(call: relax.Call, _context: Any) -> relax.TensorType:
    batch, _, channels = call.args[0].ty.shape
    return relax.TensorType([batch, channels], call.args[0].ty.dtype)


# A row each: what type a call has.
TYPES: dict[str, Callable[[relax.Call, Any], relax.TensorType]] = {
    "dense": _dense_type,
    "attention": _attention_type,
    "rotary": lambda call, _: _like(call.args[0]),
    "layer_norm": lambda call, _: _like(call.args[0]),
    "embedding": _embedding_type,
    "first_token": _first_token_type,
    "fake_quantize": lambda call, _: _like(call.args[0]),
}


def _register() -> None:
    for name, infer in TYPES.items():
        _ffi_api.RegisterOp(f"bertile.{name}", "see bertile.graph.ops")
        register_op_attr(f"bertile.{name}", "FInferType", infer)
        register_op_attr(f"bertile.{name}", "FPurity", True)
        register_op_attr(f"bertile.{name}", "TScriptPrinterName", f"bertile.{name}")


_register()
