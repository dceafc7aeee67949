"""Lets threads take the jobs of a kernel one by one, where TVM gives each an equal share.

Two cores are seldom equally fast: one of them does something else too, or shares its own with
another virtual machine, for seconds or for good. In equal shares a kernel takes as long as the
slower one.
"""

from __future__ import annotations

import tvm
from tvm import tirx

# As many threads can take jobs, each from the first job that nobody has taken.
MOST_THREADS = 256
TAKE = "bertile_take"
# The next job, or any number behind the last one. A thread that TVM gives several shares finds the
# queue empty at all but the first, and leaves it alone: a line that others write to is slow to get.
LLVM = f"""
define linkonce_odr i32 @{TAKE}(ptr %taken, i32 %jobs) alwaysinline {{
  %seen = load atomic i32, ptr %taken monotonic, align 4
  %left = icmp slt i32 %seen, %jobs
  br i1 %left, label %take, label %end
take:
  %job = atomicrmw add ptr %taken, i32 1 monotonic
  br label %end
end:
  %r = phi i32 [ %job, %take ], [ %jobs, %0 ]
  ret i32 %r
}}
"""


def with_queue(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """The kernel, whose parallel loops take their jobs from a queue; others stay as they are."""
    loops: list[tirx.For] = []
    body = _queued(func.body, loops)
    if not loops:
        return func
    linked = tirx.AttrStmt(
        tirx.const(0, "int32"), "pragma_import_llvm", tvm.ir.StringImm(LLVM), body
    )
    return func.with_body(linked)


def _queued(stmt: tirx.Stmt, loops: list[tirx.For]) -> tirx.Stmt:
    """The statement, with a queue for each parallel loop that no other loop is around."""
    if isinstance(stmt, tirx.AttrStmt):
        return tirx.AttrStmt(stmt.node, stmt.attr_key, stmt.value, _queued(stmt.body, loops))
    if isinstance(stmt, tirx.SeqStmt):
        return tirx.SeqStmt([_queued(part, loops) for part in stmt.seq])
    if not isinstance(stmt, tirx.For) or stmt.kind != tirx.ForKind.PARALLEL:
        return stmt
    loops.append(stmt)
    return _queue(stmt)


def _queue(loop: tirx.For) -> tirx.Stmt:
    """What does the jobs of a loop, which counts from 0 as all of ours do."""
    zero = tirx.const(0, "int32")
    taken, mine = (tirx.decl_buffer((1,), "int32", name) for name in ("taken", "mine"))

    def take() -> tirx.Stmt:
        number = tirx.call_extern("int32", TAKE, tirx.address_of(taken[zero]), loop.extent)
        return tirx.BufferStore(mine, number, [zero])

    job = tirx.Bind(loop.loop_var, mine[zero])
    each = tirx.While(mine[zero] < loop.extent, tirx.SeqStmt([job, loop.body, take()]))
    worker = tirx.SeqStmt([tirx.AllocBuffer(mine), take(), each])
    most = tirx.min(loop.extent, tirx.const(MOST_THREADS, "int32"))
    workers = tirx.For(tirx.Var("worker", "int32"), zero, most, tirx.ForKind.PARALLEL, worker)
    return tirx.SeqStmt([tirx.AllocBuffer(taken), tirx.BufferStore(taken, zero, [zero]), workers])
