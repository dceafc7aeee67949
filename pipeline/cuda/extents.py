"""TVM's symbolic integers as the arithmetic that a plan holds: text over batch, length, blocks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tvm import tirx

from bertile.errors import ModelError
from bertile.schedules.cuda.source import Extent

_WORDS = {"Add": "+", "Sub": "-", "Mul": "*", "FloorDiv": "//", "Div": "//", "LT": "<", "GE": ">="}
_NAME = re.compile(r"[A-Za-z_]\w*")


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
    if word == "*" and 1 in (left, right):
        return left if right == 1 else right
    return f"({left}) {word} ({right})" if word in "<>=" else f"({left} {word} {right})"


def product(extents: list[Extent]) -> Extent:
    """All of them multiplied."""
    found: Extent = 1
    for one in extents:
        found = combined(found, "*", one)
    return found


def with_names(text: Extent, values: Mapping[str, Extent]) -> Extent:
    """The extent with these names replaced; the others stay."""
    if isinstance(text, int):
        return text

    def put(name: re.Match[str]) -> str:
        value = values.get(name[0], name[0])
        return value if isinstance(value, str) and _NAME.fullmatch(value) else f"({value})"

    return _NAME.sub(put, text)
