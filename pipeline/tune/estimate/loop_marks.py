"""Puts a comment into a kernel wherever its machine code may branch.

    for i in range(n):          for i in range(n):
        y[i] = …          →         mark(1)
    z = …                           y[i] = …
                                mark(2)
                                z = …

The comments come through to the assembly, so that each stretch is known by its mark, however
LLVM has moved, cloned or rotated loops; ``loop_walk`` says how often each is passed. Why not read
trip counts from the assembly: they depend on arguments, on the number of tokens and on lists of
indices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm
from tvm import tirx

MARK = "bertile-mark"
FUNCTION = "bertile_mark"
LINK = "pragma_import_llvm"
# Memory that nobody else sees: LLVM keeps the comment, and moves loads and stores across it.
_MARKER = """
define linkonce_odr i32 @%s(i32 %%n) alwaysinline {
  call void asm sideeffect "%s %s ${0:c}", "i"(i32 %%n)
    nounwind memory(inaccessiblemem: readwrite)
  ret i32 0
}
"""


def marked(func: tirx.PrimFunc, comment: str) -> tuple[tirx.PrimFunc, int]:
    """The kernel with comments in the assembly, which begin with ``comment``; and their number."""
    marks = _Marks()
    body = marks.region(func.body)
    text = _MARKER % (FUNCTION, comment, MARK)
    if isinstance(body, tirx.AttrStmt) and body.attr_key == LINK:
        text, body = body.value.value + text, body.body
    return func.with_body(linked(body, text)), marks.number


def linked(body: Any, llvm: str) -> Any:
    """A body that may call the functions of this LLVM IR."""
    return tirx.AttrStmt(tirx.const(0, "int32"), LINK, tvm.ir.StringImm(llvm), body)


def sequence(stmts: Sequence[Any]) -> Any:
    """One statement of any number: TVM has no sequence of one or none."""
    nothing = tirx.Evaluate(tirx.const(0, "int32"))
    return tirx.SeqStmt(list(stmts)) if len(stmts) > 1 else [*stmts, nothing][0]


class _Marks:
    """Puts numbered marks where a body's control flow parts or meets."""

    def __init__(self) -> None:
        self.number = 0

    def region(self, stmt: Any) -> Any:
        """The statement with its marks, one of them at its start."""
        if isinstance(stmt, tirx.AttrStmt):
            return tirx.AttrStmt(stmt.node, stmt.attr_key, stmt.value, self.region(stmt.body))
        return tirx.SeqStmt([self._mark(), self._inside(stmt)])

    def _mark(self) -> Any:
        number = tirx.const(self.number, "int32")
        self.number += 1
        return tirx.Evaluate(tirx.call_extern("int32", FUNCTION, number))

    def _inside(self, stmt: Any) -> Any:
        if isinstance(stmt, tirx.SeqStmt):
            return sequence([part for inner in stmt.seq for part in self._behind(inner)])
        if isinstance(stmt, tirx.For):
            unrolled = stmt.kind == tirx.ForKind.UNROLLED
            body = self._inside(stmt.body) if unrolled else self.region(stmt.body)
            note = (stmt.thread_binding, stmt.annotations)
            return tirx.For(stmt.loop_var, stmt.min, stmt.extent, stmt.kind, body, *note)
        if isinstance(stmt, tirx.IfThenElse):
            cases = [case and self.region(case) for case in (stmt.then_case, stmt.else_case)]
            return tirx.IfThenElse(stmt.condition, *cases)
        return stmt

    def _behind(self, stmt: Any) -> list[Any]:
        """A statement of a sequence, and the mark behind it where it is no straight line."""
        inside = self._inside(stmt)
        return [inside] if inside.same_as(stmt) else [inside, self._mark()]
