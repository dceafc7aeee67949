"""Neurons and attention heads that zeros have cut off are removed: smaller weights, still dense.

    dense(dense(x, w, b) {gelu}, v, c)     →  the same without neuron j, if row j of v is zero, or
                                              column j of w: then it is always gelu(b[j]), and c
                                              becomes c + gelu(b[j]) v[j]
    dense(attention(dense(x, w, b)), v, c) →  the same without a head, if its rows of v are zero, or
                                              its columns of V in w: then its result is always b

A neuron of a gated layer has two columns, and what it always gives is their product.

What is computed stays the same, in 8 bits too: a constant is folded as the next layer's range
rounds it. Only a range that is found per token may get narrower.

Not done: channels of the residual stream, which every layer reads and writes, and heads that a bias
tells apart (MPNet's), since that bias would have to be cut in every request.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from math import lcm
from typing import Any

import numpy as np
from tvm import relax

from bertile.graph import ops
from bertile.graph.graph import Graph
from bertile.graph.ops import is_call
from bertile.graph.rewriting.dataflow import Dataflow, shape
from bertile.graph.rewriting.resizing import Resized
from bertile.numerics.eight_bit import quantize_input
from bertile.numerics.zeros import BLOCKS, analyse
from bertile.schedules.attention_spec import AttentionSpec
from bertile.schedules.reference import apply_activation, gated

# What is left is a multiple of this: of the four lanes, each of four channels in 8 bits, that a
# product takes at once.
CHANNELS = 16


def remove_zeros(graph: Graph) -> Graph:
    """Remove what does not count, wherever one layer alone reads what another computes.

    Weights that several layers share (ALBERT) are cut for all of them, or not at all. The notes of
    the model say how much was removed.
    """
    removed = {"attention heads": 0, "neurons": 0}
    for weights in dict.fromkeys(pair.weights for pair in _pairs(graph)):
        cut = _Cut(graph, [pair for pair in _pairs(graph) if pair.weights == weights])
        if cut.possible and cut.gone.any():
            graph = cut.apply()
            removed[cut.what] += int(cut.gone.sum()) * len(cut.pairs)
    return _noted(graph, removed)


@dataclass(frozen=True, eq=False)
class _Pair:
    """Two dense layers, of which `second` alone reads what `first` computes: through an `attention`
    or, where that is None, as it is. `var` is what the second computes.
    """

    var: relax.Var
    first: relax.Call
    attention: relax.Call | None
    second: relax.Call

    @property
    def weights(self) -> tuple[str, str]:
        return self.first.args[1].name, self.second.args[1].name

    def computes_as(self, other: _Pair) -> bool:
        """Whether both have the same biases and activations too."""
        layers = ((self.first, other.first), (self.second, other.second))
        return all(
            a.args[2].same_as(b.args[2]) and a.attrs["activation"] == b.attrs["activation"]
            for a, b in layers
        )


class _Cut:
    """What goes between the layers of all pairs of the same two weights."""

    def __init__(self, graph: Graph, pairs: list[_Pair]) -> None:
        self.graph, self.pairs, self.pair = graph, pairs, pairs[0]
        attention = self.pair.attention
        self.what = "neurons" if attention is None else "attention heads"
        self.size = 1 if attention is None else ops.attention_spec(attention).head_size
        # w (inputs, channels; or 2 of a gated layer, 3 for Q, K and V, times as many), v (channels,
        # outputs)
        self.w, self.b = (self._value(weight) for weight in self.pair.first.args[1:3])
        self.v, self.c = (self._value(weight) for weight in self.pair.second.args[1:3])
        self.channels = len(self.v)

    @property
    def possible(self) -> bool:
        """Whether nobody else reads the weights, and the pairs compute the same."""
        flow = Dataflow(self.graph.main)
        uses = [flow.uses(layer.args[1]) for layer in (self.pair.first, self.pair.second)]
        alone = uses == [len(self.pairs)] * 2
        return alone and all(pair.computes_as(self.pair) for pair in self.pairs)

    @cached_property
    def gone(self) -> np.ndarray:
        """Which neurons or heads go, a mask: as many of those that do not count as leave a multiple
        of CHANNELS, and something.

        Neighbours that a block of zeros holds go together, so that the others stay in blocks.
        """
        read = self.w if ops.is_gated(self.pair.first) else self.w[:, -self.channels :]
        unread, constant = ~self.v.any(1), ~read.any(0).reshape(-1, self.channels).any(0)
        unneeded = (unread | constant).reshape(-1, self.size).all(1)
        gone = np.zeros_like(unneeded)
        group = lcm(self._block(), self.size) // self.size if unneeded.any() else 1
        if len(unneeded) % group:
            return gone
        units = np.flatnonzero(np.repeat(unneeded.reshape(-1, group).all(1), group))
        for count in range(len(units), 0, -group):
            left = (len(unneeded) - count) * self.size
            if left and left % CHANNELS == 0:
                gone[units[:count]] = True
                break
        return gone

    def _block(self) -> int:
        """How many channels side by side a block of zeros of either weight holds.

        Channels that are zero as a whole count as full: they are no sign of blocks.
        """
        blocks = {**BLOCKS, "2:4": (4, 1)}
        columns, rows = self.w.any(0), self.v.any(1, keepdims=True)
        _, outputs = blocks.get(analyse(np.where(columns, self.w, 1)).pattern, (1, 1))
        inputs, _ = blocks.get(analyse(np.where(rows, self.v, 1)).pattern, (1, 1))
        return lcm(outputs, inputs)

    def apply(self) -> Graph:
        """The graph without what goes."""
        kept = np.repeat(~self.gone, self.size)
        columns = np.tile(kept, len(self.b) // self.channels)
        resized, readers = Resized(self.graph), len(self.pairs)
        (w, b), (v, c) = self.pair.first.args[1:3], self.pair.second.args[1:3]
        first = [resized(w, self.w[:, columns], readers), resized(b, self.b[columns], readers)]
        second = [resized(v, self.v[kept], readers), resized(c, self._folded(~kept), readers)]
        values = {}
        for pair in self.pairs:
            inner = _with_weights(pair.first, pair.first.args[0], first)
            if pair.attention is not None:
                spec = self._cut_spec(pair.attention)
                if ops.turned(inner):
                    inner = ops.with_turned(inner, spec.heads + spec.kv_heads)
                inner = ops.with_spec(pair.attention, spec, inner)
            values[pair.var] = _with_weights(pair.second, inner, second)
        return self._replanned(resized.write(values), kept)

    def _cut_spec(self, attention: relax.Call) -> AttentionSpec:
        heads = int((~self.gone).sum())
        return dataclasses.replace(ops.attention_spec(attention), heads=heads, kv_heads=heads)

    def _folded(self, gone: np.ndarray) -> np.ndarray:
        """The second layer's bias with what the channels that go have always added to it."""
        activation, b = str(self.pair.first.attrs["activation"]), self.b.astype("float64")
        if ops.is_gated(self.pair.first):
            values = gated(activation, b)
        else:
            values = apply_activation(activation, b[-self.channels :])
        plan = self.graph.plan.get(self.pair.weights[1])
        if plan is not None and plan.static:
            smooth = np.float64(1) if plan.smooth is None else plan.smooth.astype("float64")
            values = quantize_input((values * smooth)[None], plan.low, plan.high).values()[0]
            values = values / smooth
        return self.c + values[gone] @ self.v[gone].astype("float64")

    def _replanned(self, graph: Graph, kept: np.ndarray) -> Graph:
        """The graph whose plan for the second layer has factors for what is left of its inputs."""
        weight = self.pair.weights[1]
        plan = graph.plan.get(weight)
        if plan is None or plan.smooth is None:
            return graph
        plan = dataclasses.replace(plan, smooth=plan.smooth[kept])
        return dataclasses.replace(graph, plan={**graph.plan, weight: plan})

    def _value(self, expr: Any) -> np.ndarray:
        """The value of a weight, or of a constant in the place of one."""
        return self.graph.params[expr.name] if isinstance(expr, relax.Var) else expr.value.numpy()


def _pairs(graph: Graph) -> list[_Pair]:
    flow = Dataflow(graph.main)
    pairs = [_pair(flow, binding) for binding in flow.bindings]
    return [pair for pair in pairs if pair is not None]


def _pair(flow: Dataflow, binding: relax.VarBinding) -> _Pair | None:
    second, attention = binding.value, None
    if not _is_layer(flow, second) or not flow.used_once(second.args[0]):
        return None
    first = flow.definition(second.args[0])
    if is_call(first, "bertile.attention"):
        if not flow.used_once(first.args[0]) or _tells_heads_apart(first):
            return None
        attention, first = first, flow.definition(first.args[0])
    # a residual would be added to channels that are gone
    if not _is_layer(flow, first) or (len(first.args) > 3 and not _turns_both(first, attention)):
        return None
    return _Pair(binding.var, first, attention, second)


def _is_layer(flow: Dataflow, value: Any) -> bool:
    return is_call(value, "bertile.dense") and value.args[1] in flow.weights


def _turns_both(layer: relax.Call, attention: relax.Call | None) -> bool:
    """Whether a layer turns all heads of Q and of K, so that any of them may go."""
    spec = None if attention is None else ops.attention_spec(attention)
    return spec is not None and ops.turned(layer) == spec.heads + spec.kv_heads


def _tells_heads_apart(attention: relax.Call) -> bool:
    """Whether heads cannot go one by one: they share keys, or what is added knows them."""
    spec = ops.attention_spec(attention)
    bias = spec.bias == "tensor" and shape(attention.args[2])[1] != 1
    return spec.kv_heads != spec.heads or bias or spec.relative != "none"


def _with_weights(layer: relax.Call, x: Any, weights: list[Any]) -> relax.Call:
    return relax.Call(layer.op, [x, *weights, *layer.args[3:]], layer.attrs)


def _noted(graph: Graph, removed: dict[str, int]) -> Graph:
    said = [f"{count} {what}" for what, count in removed.items() if count]
    if not said:
        return graph
    note = f"zeros: {' and '.join(said)} have no effect and were removed"
    exported = dataclasses.replace(graph.exported, notes=(*graph.exported.notes, note))
    return dataclasses.replace(graph, exported=exported)
