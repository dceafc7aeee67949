"""Tells graph passes where a value comes from and who uses it, and replaces it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import tvm
import tvm_ffi
from tvm import relax

from bertile.graph.graph import Graph
from bertile.graph.ops import is_call
from bertile.graph.rewriting.folding import FOLDED

Rule = Callable[["Dataflow", relax.Call], Any]


class Dataflow:
    """The bindings of a function, with the definition and the number of uses of each variable."""

    def __init__(self, main: relax.Function) -> None:
        self.main = main
        self.bindings = [b for block in main.body.blocks for b in block.bindings]
        self._definition = {b.var: b.value for b in self.bindings}
        self._uses: Counter[relax.Var] = Counter()
        for binding in self.bindings:
            self._uses.update(variables(binding.value))
        self._uses.update(variables(main.body.body))
        self.weights = set(main.params[int(main.attrs["num_input"]) :])

    def definition(self, expr: Any) -> Any:
        """The expression behind a variable, through plain renamings; parameters and constants are
        themselves.
        """
        while isinstance(expr, relax.Var) and expr in self._definition:
            expr = self._definition[expr]
        return expr

    def call(self, expr: Any, *names: str) -> relax.Call | None:
        """The call of one of these operators that ``expr`` is or stands for, else None."""
        call = self.definition(expr)
        return call if any(is_call(call, f"relax.{n}") or is_call(call, n) for n in names) else None

    def is_op(self, expr: Any, *names: str) -> bool:
        """Whether ``expr`` is or stands for a call of one of these operators."""
        return self.call(expr, *names) is not None

    def used_once(self, expr: Any) -> bool:
        """Whether nobody else needs this value, so that fusing it away repeats no work."""
        return isinstance(expr, relax.Var) and self._uses[expr] == 1

    def uses(self, var: relax.Var) -> int:
        """How often a variable is read."""
        return self._uses[var]

    def is_weight(self, expr: Any) -> bool:
        """Whether the value is known at build time: a weight, a constant, or computed of such
        alone.
        """
        value = self.definition(expr)
        if isinstance(value, relax.Var):
            return value in self.weights
        if isinstance(value, relax.Tuple):
            return all(self.is_weight(field) for field in value.fields)
        if any(is_call(value, name) for name in FOLDED):
            return all(self.is_weight(a) for a in value.args if not isinstance(a, relax.ShapeExpr))
        return isinstance(value, tvm.ir.GenericConst)

    def used(self) -> set[relax.Var]:
        """All variables that are read somewhere."""
        return set(self._uses)

    def is_tokens(self, expr: Any) -> bool:
        """Whether a tensor is (batch, length, C) of the request."""
        extents = getattr(expr.ty, "shape", None)
        tokens = self.main.params[0].ty.shape
        if extents is None or len(extents) != 3:
            return False
        return all(tvm_ffi.structural_equal(a, b) for a, b in zip(extents, tokens))

    def is_row_batch(self, expr: Any) -> bool:
        """Whether a tensor can be in lanes: (batch, length, C) of the request, or any (N, C)."""
        return self.is_tokens(expr) or len(shape(expr) or []) == 2

    def scalar(self, expr: Any) -> float | None:
        """The value of a constant with one element, else None."""
        constant = self.definition(expr)
        if isinstance(constant, tvm.ir.GenericConst) and constant.value.numpy().size == 1:
            return float(constant.value.numpy().reshape(()))
        return None

    def split_scalar(self, call: relax.Call) -> tuple[Any, float] | None:
        """Of a two-operand call with one constant of one element: the other operand and the
        constant.
        """
        a, b = call.args
        if (value := self.scalar(b)) is not None:
            return a, value
        if (value := self.scalar(a)) is not None:
            return b, value
        return None


def rewrite(graph: Graph, rule: Rule) -> Graph:
    """Replace the value of each binding for which ``rule`` gives another expression; the rest
    stays.

    The rule sees the function as it was before; what its replacements leave unused is removed.
    """
    flow = Dataflow(graph.main)
    replaced = {}
    for binding in flow.bindings:
        if isinstance(binding.value, relax.Call):
            new = rule(flow, binding.value)
            if new is not None:
                replaced[binding.var] = new
    return replace(graph, replaced) if replaced else graph


def replace(graph: Graph, values: dict[relax.Var, Any]) -> Graph:
    """Give these variables other values, and clean up."""
    main = graph.main
    blocks = []
    for block in main.body.blocks:
        bindings = [relax.VarBinding(b.var, values.get(b.var, b.value)) for b in block.bindings]
        blocks.append(type(block)(bindings))
    body = relax.SeqExpr(blocks, main.body.body)
    return graph.with_main(
        normalized(relax.Function(main.params, body, main.ret_ty, True, main.attrs))
    )


def normalized(main: relax.Function) -> relax.Function:
    """Nested calls flattened into bindings, unused bindings dropped."""
    mod = tvm.IRModule({"main": main})
    mod = relax.transform.Normalize()(mod)
    return relax.transform.DeadCodeElimination(["main"])(mod)["main"]


def shape(expr: Any) -> list[Any] | None:
    """The extents of a tensor, integers as int; None where the shape is unknown."""
    extents = getattr(expr.ty, "shape", None)
    if not isinstance(extents, relax.ShapeExpr):
        return None
    return [int(e) if isinstance(e, tvm.tirx.IntImm) else e for e in extents]


def static(extent: Any) -> bool:
    """Whether an extent is a plain number."""
    return isinstance(extent, int)


def variables(expr: Any) -> Iterator[relax.Var]:
    """The variables that an expression names, as often as it names them."""
    if isinstance(expr, relax.Var):
        yield expr
    elif isinstance(expr, relax.Call):
        for arg in expr.args:
            yield from variables(arg)
    elif isinstance(expr, relax.Tuple):
        for field in expr.fields:
            yield from variables(field)
    elif isinstance(expr, relax.TupleGetItem):
        yield from variables(expr.tuple_value)


def same_shape(a: Any, b: Any) -> bool:
    """Whether two tensors have provably equal shapes."""
    return a.ty.shape is not None and tvm_ffi.structural_equal(a.ty.shape, b.ty.shape)
