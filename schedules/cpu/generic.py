"""Loops of operators that no schedule of ours covers: parallel outside, vectors inside, never left
as they come.

    for i, j, k: C[i, j] += A[i, k] * B[k, j]   →   parallel i · j/16, serial k, vector of 16 j
    for i, k:    C[i] += A[i, k]                →   parallel i, serial k

Good enough for the few small operators around an encoder; what takes time deserves a schedule of
its own.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.s_tir import dlight

VECTOR = 16  # elements of the innermost axis, whatever that is: no tokens

# What a kernel of ours carries: FuseOps leaves an opaque function (8) alone, and so does this
# module. The pattern alone would not do, since TVM gives it to lookups and running sums as well.
KERNEL = {"op_pattern": 8, "bertile.kernel": True}


def schedule_generic(mod: tvm.IRModule) -> tvm.IRModule:
    """Schedule every PrimFunc of the module but those that schedules of ours made."""
    functions = {
        var: _scheduled(func) if isinstance(func, tirx.PrimFunc) and not is_kernel(func) else func
        for var, func in mod.functions.items()
    }
    return tvm.IRModule(functions, attrs=mod.attrs)


def is_kernel(func: tirx.PrimFunc) -> bool:
    """Whether a schedule of ``bertile.schedules`` made this PrimFunc."""
    return bool(func.attrs) and "bertile.kernel" in func.attrs


def _scheduled(func: tirx.PrimFunc) -> tirx.PrimFunc:
    sch = s_tir.Schedule(func)
    blocks = dlight.normalize_prim_func(sch)
    if blocks is None:  # loops that the operator itself wrote (cumsum), not a nest of blocks
        return func
    for block in dlight.base.try_inline(sch, blocks):
        _schedule_block(sch, block.block_rv, [it.kind for it in block.iters])
    return sch.mod["main"].with_attrs(dict(func.attrs.items()))


def _schedule_block(sch: s_tir.Schedule, block: Any, kinds: list[str]) -> None:
    """Kinds: S for a spatial loop, R for a reduction, in the order of the loops."""
    loops = sch.get_loops(block)
    spatial = [loop for loop, kind in zip(loops, kinds) if kind == "S"]
    reduction = [loop for loop, kind in zip(loops, kinds) if kind != "S"]
    vector = None
    if spatial and _extent(sch, spatial[-1]) % VECTOR == 0 and _extent(sch, spatial[-1]):
        last, vector = sch.split(spatial.pop(), [None, VECTOR])
        spatial.append(last)
    order = spatial + reduction + ([vector] if vector is not None else [])
    if len(order) > 1:
        sch.reorder(*order)
    if vector is not None:
        sch.vectorize(vector)
    if spatial:
        sch.parallel(sch.fuse(*spatial))
    if reduction and any(_may_be_empty(sch, loop) for loop in reduction):
        sch.decompose_reduction(block, reduction[0])  # the sum of nothing is zero, not unwritten


def _may_be_empty(sch: s_tir.Schedule, loop: Any) -> bool:
    """Whether a loop goes along a part of the request, which a short one does not have."""
    return not isinstance(sch.get(loop).extent, (tirx.IntImm, tirx.Var))


def _extent(sch: s_tir.Schedule, loop: Any) -> int:
    """The extent of a loop, 0 where it is symbolic."""
    extent = sch.get(loop).extent
    return int(extent) if isinstance(extent, tirx.IntImm) else 0
