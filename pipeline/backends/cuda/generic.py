"""Operators that no schedule of ours covers: loops of TVM come in, the text and the launches of
their CUDA kernels go out. TVM's code generator needs no GPU for that.

    for i, j: y[i, j] = f(x[i, j])   →   one thread for each i, j, blocks of 1024 threads

Good enough for the few small operators around an encoder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import tirx
from tvm.ir.instrument import pass_instrument
from tvm.s_tir import dlight

from bertile.backends.cuda.extents import extent, product
from bertile.base.errors import ModelError
from bertile.lower.fusion import fusion
from bertile.schedules.cuda.source import Extent
from bertile.targets.rows import Target, tvm_target

_BYTES = {"float32": 4, "float16": 2, "int64": 8, "int32": 4, "bool": 1, "int8": 1, "uint8": 1}
_BYTES |= {"float64": 8}
# What TVM's text takes from headers, in words that need none; constants are math_constants.h's.
_PLAIN = {"int64_t": "long long", "int32_t": "int", "int8_t": "signed char"}
_PLAIN |= {"uchar": "unsigned char", "uint8_t": "unsigned char", "uint": "unsigned int"}
_PLAIN |= {
    "CUDART_INF_F": "__int_as_float(0x7f800000)",
    "CUDART_NAN_F": "__int_as_float(0x7fffffff)",
    "CUDART_INF": "__longlong_as_double(0x7ff0000000000000ll)",
    "CUDART_NAN": "__longlong_as_double(0x7ff8000000000000ll)",
}
_ENTRY = 'extern "C" __global__'


@dataclass(frozen=True)
class Step:
    """One launch. An argument is ("operand", number), ("scratch", number) or (dtype, extent)."""

    entry: str
    grid: tuple[Extent, Extent, Extent]
    threads: int
    arguments: tuple[tuple[str, Extent], ...]


@dataclass(frozen=True)
class Loops:
    """The kernels of one function: their text, what they are launched as, and the bytes of buffers
    between them. Extents are over the function's own variables.
    """

    source: str
    func: tirx.PrimFunc
    body: list[Any]

    def steps(self, values: Mapping[Any, Extent]) -> tuple[list[Step], list[Extent]]:
        """The launches and the sizes of scratch buffers, given the values of variables."""
        known = dict(values)
        places = {param: ("operand", i) for i, param in enumerate(self.func.params)}
        steps: list[Step] = []
        scratch: list[Extent] = []
        for statement in self.body:
            kind = type(statement).__name__
            if kind == "Bind":
                known[statement.var] = extent(statement.value, known)
            elif kind == "DeclBuffer":
                places[statement.buffer] = places[_behind(statement.data)]
            elif kind == "AllocBuffer":
                places[statement.buffer] = ("scratch", len(scratch))
                sizes = [extent(axis, known) for axis in statement.buffer.ty.shape]
                scratch.append(product([*sizes, _BYTES[str(statement.buffer.ty.dtype)]]))
            elif kind == "Evaluate" and isinstance(statement.value, tvm.ir.Call):
                steps.append(_step(statement.value, places, known))
        return steps, scratch


def scheduled(mod: tvm.IRModule, row: Target) -> tvm.IRModule:
    """Legalize and fuse what is left of Relax operators, and give their loops threads."""
    passes = [
        *fusion(),
        dlight.ApplyDefaultSchedule(dlight.gpu.Fallback()),
    ]
    with tvm_target(row):
        return tvm.transform.Sequential(passes)(mod)


def loops(name: str, func: tirx.PrimFunc, row: Target) -> Loops:
    """Compile a scheduled function to CUDA text; its entries begin with ``name``."""
    target = tvm_target(row)
    mod = tvm.IRModule({name: func.with_attr("global_symbol", name)})
    mod = tirx.transform.BindTarget(target.with_host(tvm.target.Target("llvm")))(mod)
    pipeline, _, finish = tirx.get_default_tir_pipeline(target)
    captured = _Captured()
    try:
        with tvm.transform.PassContext(instruments=[captured]):
            mod = pipeline(mod)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise ModelError(
            f"TVM has no kernel of {name.removeprefix('loops_')} for a GPU: {reason}",
            "compile the model for a CPU",
        ) from error
    on_device = tvm.IRModule({v: f for v, f in mod.functions.items() if _is_cuda(f)})
    built = tvm.get_global_func("target.build.cuda")(finish()(on_device), target)
    hosts = [f for f in captured.mod.functions.values() if "calling_conv" not in f.attrs]
    body = hosts[0].body
    return Loops(
        _plain(built.inspect_source("cuda")), hosts[0], list(getattr(body, "seq", None) or [body])
    )


@pass_instrument
class _Captured:
    """Keeps the module in which host and device are apart, but launches are still readable."""

    def run_after_pass(self, mod: tvm.IRModule, info: Any) -> None:
        if info.name.endswith("SplitHostDevice"):
            self.mod = mod


def _is_cuda(func: Any) -> bool:
    return func.attrs["target"].kind.name == "cuda"


def _behind(data: Any) -> Any:
    """The buffer whose ``.data`` an expression is."""
    return data.args[0] if isinstance(data, tvm.ir.Call) else data


def _step(call: Any, places: Mapping[Any, Any], known: Mapping[Any, Extent]) -> Step:
    words = [str(word) for word in call.attrs.launch_params]
    name, *rest = call.args
    operands, extents = rest[: len(rest) - len(words)], rest[len(rest) - len(words) :]
    launch = {word: extent(size, known) for word, size in zip(words, extents)}
    threads = launch.pop("threadIdx.x", 1)
    grid = tuple(launch.pop(f"blockIdx.{axis}", 1) for axis in "xyz")
    if launch or not isinstance(threads, int):
        raise ModelError(
            f"TVM launches {name.value} with {', '.join(launch) or 'unknown threads'}, which a"
            " plan for a GPU cannot express",
            "compile the model for a CPU",
        )
    arguments = tuple(
        places[_behind(operand)]
        if isinstance(operand, tvm.ir.Call) and _behind(operand) in places
        else (str(operand.ty.dtype), extent(operand, known))
        for operand in operands
    )
    return Step(str(name.value), grid, threads, arguments)


def _plain(source: str) -> str:
    """The kernels alone, in types and constants that need no headers."""
    text = source[source.index(_ENTRY) :]
    lines = [
        line for line in text.splitlines() if not (line.startswith(_ENTRY) and line[-1] == ";")
    ]
    known = "|".join(_PLAIN)
    return re.sub(rf"\b(?:{known})\b", lambda word: _PLAIN[word[0]], "\n".join(lines)) + "\n"
