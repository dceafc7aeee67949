"""Extents: TVM's arithmetic as text that gives the same numbers."""

from __future__ import annotations

import pytest

from bertile.cuda.extents import combined, extent, product, with_names
from bertile.cuda_loader import evaluate
from bertile.errors import ModelError

tvm = pytest.importorskip("tvm")


def test_an_expression_of_tvm_has_the_same_value_as_text():
    n, m = (tvm.tirx.Var(name, "int64") for name in ("n", "m"))
    expr = (n * 16 + 15 - m) // 8 * (m + 1)
    text = extent(expr, {n: "blocks", m: "length"})
    assert evaluate(text, {"blocks": 5, "length": 9, "batch": 1}) == (5 * 16 + 15 - 9) // 8 * 10


def test_what_is_known_is_computed():
    n = tvm.tirx.Var("n", "int64")
    assert extent(tvm.tirx.IntImm("int64", 3), {}) == 3
    assert extent(n * 4, {n: 3}) == 12
    assert (combined("rows", "*", 1), combined(7, "//", 2)) == ("rows", 3)
    assert product([2, "batch", 3, 1]) == "((2 * batch) * 3)"


def test_names_are_replaced_whole():
    assert with_names(
        "rows + rows_0 * n", {"rows": "(16 * blocks)", "n": 3, "rows_0": "batch"}
    ) == ("((16 * blocks)) + batch * (3)")
    assert with_names(5, {}) == 5


def test_what_no_plan_can_say_is_refused():
    n = tvm.tirx.Var("n", "int64")
    with pytest.raises(ModelError, match="cannot be written into a plan"):
        extent(tvm.tirx.max(n, 3), {n: "batch"})
