"""Writes TVM's symbolic integers as the arithmetic that a plan holds: text over batch, length and
blocks.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from tvm import tirx

from bertile.base.errors import ModelError
from bertile.schedules.cuda.source import Extent

_WORDS = {"Add": "+", "Sub": "-", "Mul": "*", "FloorDiv": "//", "Div": "//", "LT": "<", "GE": ">="}
_SIGNS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.FloorDiv: "//", ast.Lt: "<", ast.GtE: ">="}


def extent(expr: Any, values: Mapping[Any, Extent]) -> Extent:
    """The extent that an expression of TVM is, where ``values`` has what its variables are."""
    if isinstance(expr, int):
        return expr
    if isinstance(expr, tirx.IntImm):
        return int(expr)
    if isinstance(expr, tirx.Var) and expr in values:
        return values[expr]
    word = _WORDS.get(type(expr).__name__)
    if type(expr).__name__ == "Cast":
        return extent(expr.value, values)
    if word is None:
        raise ModelError(
            f"the size {expr} cannot be written into a plan for a GPU",
            "compile the model for a CPU",
        )
    return combined(extent(expr.a, values), word, extent(expr.b, values))


def combined(left: Extent, word: str, right: Extent) -> Extent:
    """Two extents with a word between them; whatever is known at once is computed."""
    if isinstance(left, int) and isinstance(right, int):
        known = {"+": left + right, "-": left - right, "*": left * right}
        if word in known:
            return known[word]
        if word == "//":
            return left // right
    if (word, right) in (("*", 1), ("//", 1), ("+", 0), ("-", 0)):
        return left
    if (word, left) in (("*", 1), ("+", 0)):
        return right
    return ast.unparse(ast.parse(f"({left}) {word} ({right})"))  # parentheses where they are needed


def product(extents: list[Extent]) -> Extent:
    """All of them multiplied."""
    total: Extent = 1
    for factor in extents:
        total = combined(total, "*", factor)
    return total


def with_names(text: Extent, values: Mapping[str, Extent]) -> Extent:
    """The extent with these names replaced; the others stay."""
    return text if isinstance(text, int) else _value(ast.parse(text, mode="eval").body, values)


def _value(node: ast.AST, values: Mapping[str, Extent]) -> Extent:
    if isinstance(node, ast.Name):
        return values.get(node.id, node.id)
    if isinstance(node, ast.BinOp):
        left, word, right = node.left, node.op, node.right
    elif isinstance(node, ast.Compare):
        left, (word,), (right,) = node.left, node.ops, node.comparators
    else:
        return ast.literal_eval(node)  # a number
    return combined(_value(left, values), _SIGNS[type(word)], _value(right, values))
