"""Counts how often each mark of a kernel is passed, and how many cache lines each cache lacks
meanwhile.

    for i in range(n):              for i in range(n):
        mark(1)               →         counts[1] += 1
        y[i] = f(x[i])                  touch(x[i])
                                        touch(y[i])

What is left of the kernel is built for this machine and run, whatever machine it was made for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import tirx

from bertile.codegen import llvm
from bertile.targets.rows import Target
from bertile.tune.estimate.loop_marks import FUNCTION, linked, sequence

LINE = 64  # bytes that a cache takes at once
_TOUCH = "bertile_touch"
_CALL = tvm.ir.Op.get("tirx.call_extern")


@dataclass(frozen=True)
class Passes:
    """How often each mark was passed, and the lines that each cache had to fetch."""

    marks: np.ndarray
    fetched: tuple[int, ...]


class Walk:
    """A kernel as the thread with the most jobs goes through its loops and its memory."""

    def __init__(
        self, func: tirx.PrimFunc, marks: int, caches: Sequence[int], threads: int, host: Target
    ) -> None:
        """``caches`` are bytes, the nearest first; ``host`` is a row of this machine."""
        self._marks, self._caches = marks, tuple(caches)
        counts = tirx.decl_buffer((marks,), "int64", "counts")
        state = tirx.decl_buffer((self._size(),), "int64", "state")
        body = linked(_Counter(func, counts, state, threads).of(func.body), _touch(caches))
        counter = tirx.PrimFunc([*func.params, counts, state], body, attrs=func.attrs)
        self._run = llvm.build_kernel(counter, host)

    def passes(self, arguments: Sequence[np.ndarray]) -> Passes:
        """Go through the kernel with these arguments, from empty caches."""
        counts, state = (np.zeros(size, "int64") for size in (self._marks, self._size()))
        tensors = [tvm.runtime.tensor(array) for array in (counts, state)]
        self._run(*map(tvm.runtime.tensor, arguments), *tensors)
        fetched = tensors[1].numpy()[: len(self._caches)]
        return Passes(tensors[0].numpy(), tuple(map(int, fetched)))

    def _size(self) -> int:
        return len(self._caches) + sum(size // LINE for size in self._caches)


def _touch(caches: Sequence[int]) -> str:
    """A function that looks an address up in caches of two ways, the older of which goes.

    The state begins with what each cache had to fetch; behind that lie its lines, two a set.
    """
    text = f"\ndefine linkonce_odr i32 @{_TOUCH}(ptr %state, ptr %address) {{\n"
    text += f"  %byte = ptrtoint ptr %address to i64\n  %line = udiv i64 %byte, {LINE}\n"
    start = len(caches)
    for n, size in enumerate(caches):
        sets = size // LINE // 2
        text += f"""  %set{n} = urem i64 %line, {sets}
  %two{n} = shl i64 %set{n}, 1
  %at{n} = add i64 %two{n}, {start}
  %new{n} = getelementptr i64, ptr %state, i64 %at{n}
  %old{n} = getelementptr i64, ptr %new{n}, i64 1
  %a{n} = load i64, ptr %new{n}
  %isa{n} = icmp eq i64 %a{n}, %line
  br i1 %isa{n}, label %found, label %second{n}
second{n}:
  %b{n} = load i64, ptr %old{n}
  store i64 %a{n}, ptr %old{n}
  store i64 %line, ptr %new{n}
  %isb{n} = icmp eq i64 %b{n}, %line
  br i1 %isb{n}, label %found, label %missed{n}
missed{n}:
  %count{n} = getelementptr i64, ptr %state, i64 {n}
  %m{n} = load i64, ptr %count{n}
  %n{n} = add i64 %m{n}, 1
  store i64 %n{n}, ptr %count{n}
"""
        start += 2 * sets
    return text + "  br label %found\nfound:\n  ret i32 0\n}\n"


class _Counter:
    """Makes a counter of a marked body: nothing stays but loops, conditions and addresses."""

    def __init__(self, func: tirx.PrimFunc, counts: Any, state: Any, threads: int) -> None:
        self._arguments, self._counts, self._state = func.params, counts, state
        self._threads, self._unknown = threads, []

    def of(self, stmt: Any) -> Any:
        """The statement's counter, which may be an empty one."""
        if isinstance(stmt, tirx.SeqStmt):
            return sequence(list(_once(map(self.of, stmt.seq))))
        if isinstance(stmt, tirx.AttrStmt):
            return self.of(stmt.body)
        if isinstance(stmt, tirx.For):
            share = self._threads if stmt.kind == tirx.ForKind.PARALLEL else 1
            extent = (stmt.extent + (share - 1)) // share
            serial = tirx.ForKind.SERIAL
            return tirx.For(stmt.loop_var, stmt.min, extent, serial, self.of(stmt.body))
        if isinstance(stmt, tirx.IfThenElse):
            cases = [case and self.of(case) for case in (stmt.then_case, stmt.else_case)]
            return tirx.IfThenElse(stmt.condition, *cases)
        return self._line(stmt)

    def _line(self, stmt: Any) -> Any:
        if isinstance(stmt, tirx.Evaluate):
            if _extern(stmt.value) != FUNCTION:
                return sequence([])
            place = stmt.value.args[1]
            count = self._counts[place] + tirx.const(1, "int64")
            return tirx.BufferStore(self._counts, count, [place])
        if isinstance(stmt, tirx.Bind):
            return sequence([*self._touches(stmt.value), *self._bound(stmt)])
        if isinstance(stmt, tirx.BufferStore):
            stored = (stmt.buffer, stmt.indices)
            return sequence([*self._touches(stmt.value), *self._touch(*stored)])
        return sequence([])

    def _bound(self, stmt: Any) -> list[Any]:
        """An integer that loops, conditions or addresses may ask for; none of what is computed."""
        value = stmt.value
        if _extern(value) == "bertile_index":
            value = value.args[1]  # which it gives back
        calls: list[Any] = []
        tvm_ffi.structural_walk(value, (tvm.ir.Call, calls.append))
        integer = str(value.ty.dtype) in ("int32", "int64", "uint32", "uint64", "bool")
        if integer and not any(map(_extern, calls)):
            return [tirx.Bind(stmt.var, value)]
        self._unknown.append(stmt.var)
        return []

    def _touches(self, value: Any) -> list[Any]:
        loads: list[Any] = []
        tvm_ffi.structural_walk(value, (tvm.ir.TensorLoad, loads.append))
        return [touch for load in loads for touch in self._touch(load.source, load.indices)]

    def _touch(self, buffer: Any, indices: Sequence[Any]) -> list[Any]:
        """A look at an element's line; none where it is of a kernel's own, which stay near."""
        if not any(buffer.same_as(argument) for argument in self._arguments):
            return []
        first = tuple(index.base if isinstance(index, tirx.Ramp) else index for index in indices)
        names: list[Any] = []
        tvm_ffi.structural_walk(first, (tirx.Var, names.append))
        if any(name.same_as(unknown) for name in names for unknown in self._unknown):
            return []
        places = [tirx.address_of(element) for element in (self._state[0], buffer[first])]
        return [tirx.Evaluate(tirx.call_extern("int32", _TOUCH, *places))]


def _extern(value: Any) -> str | None:
    """The name of the linked function that is called."""
    called = isinstance(value, tvm.ir.Call) and value.op.same_as(_CALL)
    return str(value.args[0].value) if called else None


def _once(stmts: Iterable[Any]) -> Iterator[Any]:
    """Without the second of two equal statements that nothing but straight code lies between."""
    seen: set[int] = set()
    for stmt in (part for whole in stmts for part in _flat(whole)):
        if isinstance(stmt, (tirx.For, tirx.IfThenElse)):
            seen = set()
        elif isinstance(stmt, tirx.Evaluate):
            key = tvm_ffi.structural_hash(stmt, map_free_vars=False)
            if key in seen:
                continue
            seen.add(key)
        yield stmt


def _flat(stmt: Any) -> Iterator[Any]:
    if isinstance(stmt, tirx.SeqStmt):
        for part in stmt.seq:
            yield from _flat(part)
    else:
        yield stmt
