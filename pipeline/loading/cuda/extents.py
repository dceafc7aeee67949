"""Computes the sizes of a plan, which are arithmetic over the shape of a request."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Mapping

from bertile.loading.errors import AGAIN, BundleError

Extent = int | str
_ALLOWED = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.Compare, ast.Name, ast.Load, ast.Constant,
    ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.USub, ast.Lt, ast.GtE,
)  # fmt: skip
_LONGEST = 1000  # characters of an extent; deeper nesting than that holds would end the parser


def evaluate(extent: Extent, symbols: Mapping[str, int]) -> int:
    """Return the value of an extent: an integer, or text over the names of `symbols`.

    Text may hold + - * // and parentheses, and < and >=, which give 1 or 0. Raises BundleError
    for anything else.
    """
    if type(extent) is int:
        return extent
    if not isinstance(extent, str):
        raise _no_extent(extent, symbols)
    try:
        return int(compiled((extent,), tuple(symbols))(*symbols.values())[0])
    except ZeroDivisionError as error:
        raise BundleError(f"'{extent}' divides by zero", AGAIN) from error


@functools.lru_cache(maxsize=4096)
def compiled(extents: tuple[Extent, ...], names: tuple[str, ...]):
    """A function of the symbols that gives the values of all extents at once."""
    for extent in extents:
        check_extent(extent, names)
    text = "".join(f"({extent}), " for extent in extents)
    return eval(f"lambda {', '.join(names)}: ({text})", {"__builtins__": {}})


def check_extent(extent: Extent, names: tuple[str, ...]) -> None:
    """Only what `_ALLOWED` lists is ever compiled: a bundle's plan must not run code of its own."""
    if type(extent) is int:
        return
    if not isinstance(extent, str) or len(extent) > _LONGEST:
        raise _no_extent(extent, names)
    try:
        tree = ast.parse(extent, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _no_extent(extent, names) from error
    for node in ast.walk(tree):
        known = isinstance(node, _ALLOWED)
        if isinstance(node, ast.Constant):
            known = type(node.value) is int and node.value < 1 << 62
        elif isinstance(node, ast.Name):
            known = node.id in names
        if not known:
            raise _no_extent(extent, names)


def _no_extent(extent: object, names: Iterable[str]) -> BundleError:
    return BundleError(
        f"the plan has the extent {str(extent)[:80]!r}, no arithmetic over {', '.join(names)}",
        AGAIN,
    )
