"""Gives the inputs of any exporter's file our names, integers and axes.

    input_mask: float32 (?, ?)   →   attention_mask: int64 (batch, length) → Cast → input_mask

A cast stands in front of a graph that wants another type; nothing else of it changes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from bertile.base.errors import ModelError, UsageError, nearest
from bertile.loader import BOXES, SIDES, filled
from bertile.onnx.dependence import is_lookup, lookup_source
from bertile.onnx.exported import DEFAULTS, InputSpec
from bertile.onnx.graph import OnnxGraph
from bertile.onnx.probing import opened
from bertile.onnx.rewrites import pick_from_stacks

# What Google's BERT, TensorFlow's hub, fairseq and ONNX Runtime's tools call them.
ALIASES = {
    "input_ids": ("input_word_ids", "src_tokens", "token_ids", "ids"),
    "attention_mask": ("input_mask", "attn_mask", "mask"),
    "token_type_ids": ("segment_ids", "input_type_ids", "token_types", "type_ids"),
    "position_ids": ("pos_ids", "positions"),
}
_INTEGERS = (onnx.TensorProto.INT32, onnx.TensorProto.INT64)
_NUMBERS = {
    onnx.TensorProto.BOOL,
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.DOUBLE,
    *(getattr(onnx.TensorProto, f"{sign}INT{bits}") for sign in ("", "U") for bits in (8, 16, 32)),
    onnx.TensorProto.INT64,
    onnx.TensorProto.UINT64,
}


def present(
    graph: OnnxGraph, path: Path, rename: Iterable[str] = ()
) -> tuple[int | None, int | None, tuple[str, ...]]:
    """Rename and retype the inputs in place; return the sizes of static axes, and notes.

    ``rename`` says OLD=NEW for names of the file that are nobody else's. Boxes become an input for
    each side. Raises ModelError for an input that is none of ours, or no (batch, length) tensor of
    numbers.
    """
    _take_boxes_apart(graph)
    names = canonical_names([value.name for value in graph.inputs], path, rename)
    notes, sizes = [], []
    for value in graph.inputs:
        kind, old, name = value.type.tensor_type, value.name, names[value.name]
        dims = kind.shape.dim
        if kind.elem_type not in _NUMBERS or (kind.HasField("shape") and len(dims) != 2):
            raise ModelError(
                f"input '{old}' of '{path}' is not a (batch, length) tensor of numbers"
            )
        # without a shape, or of -1, as Paddle writes it: any
        sizes.append([max(dim.dim_value, 0) for dim in dims] or [0, 0])
        wanted = kind.elem_type
        stored = wanted if wanted in _INTEGERS else onnx.TensorProto.INT64
        if old != name:
            _free(graph, name)
            graph.rename_tensor(old, name)
            notes.append(f"the input '{old}' of the file is called {name}")
        if stored != wanted:
            inner = graph.fresh(name)
            graph.rename_tensor(name, inner)
            graph.nodes.append(helper.make_node("Cast", [name], [inner], name=inner, to=wanted))
        shape = [size or axis for size, axis in zip(sizes[-1], ("batch", "length"))]
        value.CopyFrom(helper.make_tensor_value_info(name, stored, shape))
    batch, length = ({pair[axis] for pair in sizes} - {0} for axis in (0, 1))
    if len(batch) > 1 or len(length) > 1:
        raise ModelError(f"the inputs of '{path}' have different static shapes")
    return next(iter(batch), None), next(iter(length), None), tuple(notes)


def canonical_names(names: Sequence[str], path: Path, rename: Iterable[str] = ()) -> dict[str, str]:
    """Return our name for each input of a file; ModelError where one has none, or two have one."""
    asked = dict(entry.split("=", 1) for entry in rename)
    names = [name for name in names if name != BOXES]
    for old, new in asked.items():
        if old not in names:
            raise UsageError(
                f"'{path}' has no input '{old}' to rename{nearest(old, names)}",
            )
        if new not in DEFAULTS:
            raise UsageError(f"no input is called '{new}'{nearest(new, DEFAULTS)}")
    # what is said goes first, then what is called so already, then what resembles it
    ours = {name: asked.get(name, name) for name in names}
    taken = {new for new in ours.values() if new in DEFAULTS}
    for name, new in ours.items():
        if new not in DEFAULTS and (alias := _alias(name)) and alias not in taken:
            ours[name] = alias
            taken.add(alias)
    for name, new in ours.items():
        if new not in DEFAULTS:
            raise ModelError(
                f"'{path}' has the input '{name}', which is unsupported{nearest(name, DEFAULTS)}",
                f"if it is one of these, say so: --rename {name}={_alias(name) or 'input_ids'}",
            )
        if list(ours.values()).count(new) > 1:
            raise ModelError(f"two inputs of '{path}' would be called '{new}'")
    if "input_ids" not in ours.values():
        raise ModelError(
            f"'{path}' has no input 'input_ids' (it has {', '.join(names) or 'none'})",
            "if one of these is it, say so: --rename NAME=input_ids" if names else None,
        )
    return ours


def input_specs(graph: OnnxGraph) -> tuple[InputSpec, ...]:
    """Describe the inputs in their canonical order, with the size of the table each looks up."""
    types = {value.name: value.type.tensor_type.elem_type for value in graph.inputs}
    below: dict[str, int] = {}
    for node in graph.nodes:
        source, offset = lookup_source(graph, node) if is_lookup(graph, node) else ("", 0)
        if source in types:
            rows = graph.shape(node.input[0])[0] - offset
            below[source] = min(rows, below.get(source, rows))
    below["attention_mask"] = 2
    dtypes = {onnx.TensorProto.INT64: "int64", onnx.TensorProto.INT32: "int32"}
    return tuple(
        InputSpec(name, dtypes[types[name]], below.get(name), default)
        for name, default in DEFAULTS.items()
        if name in types
    )


def tried_limits(
    graph: OnnxGraph,
    inputs: tuple[InputSpec, ...],
    opset: int,
    batch: int | None,
    length: int | None,
) -> tuple[InputSpec, ...]:
    """Find by trying what ids the graph takes, where no lookup of its inputs tells."""
    if all(spec.below for spec in inputs):
        return inputs
    shape = (batch or 1, length or 1)
    feed = {spec.name: np.full(shape, spec.default == "ones", spec.dtype) for spec in inputs}
    with opened(graph.to_model(opset)) as runner:

        def takes(name: str, value: int) -> bool:
            array = np.full_like(feed[name], value)
            try:
                runner.run(graph.outputs[:1], {**feed, name: array})
            except Exception:  # onnxruntime has no public base class for its errors
                return False
            return True

        return tuple(
            spec if spec.below else dataclasses.replace(spec, below=_below(takes, spec.name))
            for spec in inputs
        )


def _below(takes: Callable[[str, int], bool], name: str) -> int | None:
    fine, wrong = 0, (1 << 31) - 1
    if takes(name, wrong - 1) or not takes(name, fine):
        return None  # any will do; or the graph does not run at all, which the probes will say
    while wrong - fine > 1:
        middle = (fine + wrong) // 2
        fine, wrong = (middle, wrong) if takes(name, middle) else (fine, middle)
    return fine + 1


class Fed:
    """A model in ONNX Runtime that is fed as its bundle is: by our names, in integers.

    An input that a request lacks is filled as a loader fills it.
    """

    def __init__(self, runner: Any, names: Mapping[str, str]) -> None:
        self._runner, self._names = runner, names

    @classmethod
    def of(cls, runner: Any, path: Path, rename: Iterable[str] = ()) -> Fed:
        """The session of a file whose inputs have the names that its exporter gave them."""
        names = [argument.name for argument in runner.get_inputs()]
        # of a file that we wrote, an input may be renamed already
        asked = [entry for entry in rename if entry.split("=", 1)[0] in names]
        return cls(runner, canonical_names(names, path, asked))

    def get_outputs(self) -> Any:
        return self._runner.get_outputs()

    def run(self, names: list[str], feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Compute outputs by name, for arrays (batch, length) by our names."""
        shape, arrays = feed["input_ids"].shape, {}
        for argument in self._runner.get_inputs():
            name = self._names.get(argument.name, argument.name)
            if name == BOXES:
                whole = np.stack([feed[side] for side in SIDES], axis=-1)
            else:
                value = feed[name] if name in feed else filled(DEFAULTS.get(name), shape) or 0
                whole = np.broadcast_to(value, shape)
            arrays[argument.name] = np.ascontiguousarray(whole, _dtype(argument.type))
        return self._runner.run(names, arrays)


def _dtype(kind: str) -> np.dtype:
    """numpy's type for ONNX Runtime's name of a tensor: tensor(int64), tensor(float) …"""
    name = kind[len("tensor(") : -1]
    return np.dtype({"float": "float32", "double": "float64"}.get(name, name))


def _alias(name: str) -> str | None:
    """Our name for what an exporter wrote: serving_default_input_mask:0 is attention_mask."""
    stem = re.sub(r"^(.*/)?(serving_default_)?", "", name)
    stem = re.sub(r"([:._]\d+)+$", "", stem).lower()
    for ours, aliases in ALIASES.items():
        if stem == ours or stem in aliases:
            return ours
    return None


def _take_boxes_apart(graph: OnnxGraph) -> None:
    """bbox (batch, length, 4) → Concat of its four sides, of which none ends before it begins."""
    boxes = next((value for value in graph.inputs if value.name == BOXES), None)
    if boxes is None or len(boxes.type.tensor_type.shape.dim) != 3:
        return
    inner = graph.fresh(BOXES)
    graph.rename_tensor(BOXES, inner)
    kind, dims = boxes.type.tensor_type.elem_type, boxes.type.tensor_type.shape.dim
    axes = [dim.dim_value or dim.dim_param for dim in dims[:2]]
    others = [value for value in graph.inputs if value.name != BOXES]
    sides = [helper.make_tensor_value_info(side, kind, axes) for side in SIDES]
    graph.inputs = [*others, *sides]
    left, top, right, bottom = SIDES
    right, bottom = (
        graph.add("Where", [graph.add("Greater", [b, a]), b, a])
        for a, b in ((left, right), (top, bottom))
    )
    last = graph.integers(2)
    parts = [graph.add("Unsqueeze", [side, last]) for side in (left, top, right, bottom)]
    graph.nodes.append(helper.make_node("Concat", parts, [inner], name=inner, axis=2))
    pick_from_stacks(graph, lambda name: axes)


def _free(graph: OnnxGraph, name: str) -> None:
    """Give a tensor within the graph another name, where an input is to have this one."""
    if graph.is_constant(name):
        graph.rename_constant(name, graph.fresh(name))
    elif name in graph.producers():
        graph.rename_tensor(name, graph.fresh(name))
