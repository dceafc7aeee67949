"""Puts the stores of TVM's shape functions in order, so that one graph gives one machine code.

before    H[9] = 512 * H[0]        after    H[3] = 8 * H[1]
          H[3] = 8 * H[1]                   H[9] = 512 * H[0]

VMShapeLower computes the sizes of all tensors from those of the inputs, in the order of a table
that hashes addresses: another one in each process.
"""

from __future__ import annotations

from typing import Any

import tvm
import tvm_ffi
from tvm import tirx


def order_shape_stores() -> tvm.transform.Pass:
    """The pass, for behind VMShapeLower. A store that reads what another writes stays in place."""

    @tvm.transform.module_pass(opt_level=0, name="OrderShapeStores")
    def run(mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        changed = {
            var: ordered
            for var, func in mod.functions.items()
            if isinstance(func, tirx.PrimFunc) and (ordered := _ordered(func)) is not None
        }
        mod = tvm.IRModule(mod.functions, attrs=mod.attrs)
        for var, func in changed.items():
            mod.update_func(var, func)
        return mod

    return run


def _ordered(func: tirx.PrimFunc) -> tirx.PrimFunc | None:
    """The function with its stores by index; None where that could change what it computes."""
    hosts = func.attrs and func.attrs.get("tirx.is_host_func")
    if not hosts or not isinstance(func.body, tirx.SeqStmt):
        return None
    stores = list(func.body.seq)
    if not all(map(_is_plain, stores)):
        return None
    written = [int(store.indices[0]) for store in stores]
    read = {index for store in stores for index in _reads(store.value)}
    if len(set(written)) < len(written) or read.intersection(written):
        return None
    return func.with_body(tirx.SeqStmt(sorted(stores, key=lambda store: int(store.indices[0]))))


def _is_plain(statement: tirx.Stmt) -> bool:
    """Whether a statement stores to an index that is a number."""
    store = isinstance(statement, tirx.BufferStore)
    return store and len(statement.indices) == 1 and isinstance(statement.indices[0], tirx.IntImm)


def _reads(value: Any) -> set[int]:
    """The indices that an expression reads."""
    loads: list[Any] = []
    tvm_ffi.structural_walk(value, (tvm.ir.TensorLoad, loads.append))
    return {int(index) for load in loads for index in load.indices}
