"""Shape functions store in one order, whatever order TVM came up with."""

from __future__ import annotations

import pytest
import tvm
from tvm.script import ir as I
from tvm.script import tirx as T

from bertile.codegen.shape_stores import order_shape_stores


@I.ir_module
class Before:
    @T.prim_func(s_tir=True)
    def shape_func(H: T.Buffer((T.int64(5),), "int64")):
        T.func_attr({"tirx.is_host_func": True})
        H[T.int64(4)] = T.int64(512) * H[T.int64(0)]
        H[T.int64(2)] = (H[T.int64(1)] + T.int64(15)) // T.int64(16)
        H[T.int64(3)] = T.int64(4) * H[T.int64(0)] * H[T.int64(1)]


@I.ir_module
class After:
    @T.prim_func(s_tir=True)
    def shape_func(H: T.Buffer((T.int64(5),), "int64")):
        T.func_attr({"tirx.is_host_func": True})
        H[T.int64(2)] = (H[T.int64(1)] + T.int64(15)) // T.int64(16)
        H[T.int64(3)] = T.int64(4) * H[T.int64(0)] * H[T.int64(1)]
        H[T.int64(4)] = T.int64(512) * H[T.int64(0)]


def test_stores_are_ordered_by_their_index():
    tvm.ir.assert_structural_equal(order_shape_stores()(Before), After)
    tvm.ir.assert_structural_equal(order_shape_stores()(After), After)


@I.ir_module
class Reads:
    """The second store reads what the first has written."""

    @T.prim_func(s_tir=True)
    def shape_func(H: T.Buffer((T.int64(4),), "int64")):
        T.func_attr({"tirx.is_host_func": True})
        H[T.int64(3)] = T.int64(512) * H[T.int64(0)]
        H[T.int64(2)] = H[T.int64(3)] + T.int64(1)


@I.ir_module
class Twice:
    """The last store to an index counts."""

    @T.prim_func(s_tir=True)
    def shape_func(H: T.Buffer((T.int64(4),), "int64")):
        T.func_attr({"tirx.is_host_func": True})
        H[T.int64(3)] = H[T.int64(0)]
        H[T.int64(2)] = H[T.int64(0)]
        H[T.int64(3)] = H[T.int64(1)]


@I.ir_module
class Kernel:
    """No shape function, though it looks like it."""

    @T.prim_func(s_tir=True)
    def kernel(H: T.Buffer((T.int64(4),), "int64")):
        H[T.int64(3)] = H[T.int64(0)]
        H[T.int64(2)] = H[T.int64(0)]


@I.ir_module
class Branches:
    @T.prim_func(s_tir=True)
    def shape_func(H: T.Buffer((T.int64(4),), "int64")):
        T.func_attr({"tirx.is_host_func": True})
        if H[T.int64(0)] > T.int64(1):
            H[T.int64(3)] = H[T.int64(0)]
        H[T.int64(2)] = H[T.int64(0)]


@pytest.mark.parametrize("mod", [Reads, Twice, Kernel, Branches])
def test_what_the_order_could_change_is_left_alone(mod):
    tvm.ir.assert_structural_equal(order_shape_stores()(mod), mod)
