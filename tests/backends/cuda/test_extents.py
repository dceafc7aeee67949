"""Extents: TVM's arithmetic as text that gives the same numbers."""

from __future__ import annotations

import pytest

from bertile.backends.cuda.extents import combined, extent, product, with_names
from bertile.base.errors import ModelError
from bertile.cuda_loader import evaluate

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
    assert product([2, "batch", 3, 1]) == "2 * batch * 3"


def test_names_are_replaced_whole():
    values = {"rows": "16 * blocks", "n": 3, "rows_0": "batch"}
    assert with_names("rows + rows_0 * n", values) == "16 * blocks + batch * 3"
    assert with_names(5, {}) == 5


@pytest.mark.parametrize(
    ("text", "rows", "expected"),
    [
        ("rows", "blocks * 16", "blocks * 16"),
        ("(rows + 15) // 16 * 12", "blocks * 16", "(blocks * 16 + 15) // 16 * 12"),
        ("(rows + 1) // 2", 5, 3),
        ("(rows + 0) // 1", "batch", "batch"),
        ("rows * 3 - rows", "batch + 1", "(batch + 1) * 3 - (batch + 1)"),
        ("7 - (rows - 2)", "batch", "7 - (batch - 2)"),
        ("256 * rows // 3", "batch // 2", "256 * (batch // 2) // 3"),
        ("rows < 192", "blocks * 16", "blocks * 16 < 192"),
        ("(rows >= 192) * 4", "batch", "(batch >= 192) * 4"),
    ],
)
def test_parentheses_stand_where_they_are_needed(text, rows, expected):
    printed = with_names(text, {"rows": rows})
    assert printed == expected
    for batch, blocks in ((1, 1), (5, 9), (300, 40)):
        known = {"batch": batch, "blocks": blocks}
        assert evaluate(printed, known) == evaluate(text, {"rows": evaluate(rows, known)})


def test_what_no_plan_can_say_is_refused():
    n = tvm.tirx.Var("n", "int64")
    with pytest.raises(ModelError, match="cannot be written into a plan"):
        extent(tvm.tirx.max(n, 3), {n: "batch"})
