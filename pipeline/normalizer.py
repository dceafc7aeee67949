"""An ONNX file that any exporter wrote comes in; the canonical form of the same model goes out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from bertile import models, onnx_rewrites
from bertile.canonical import Canonical, is_lookup, source_input
from bertile.config import Config
from bertile.errors import ModelError, NumericMismatchError, nearest, require
from bertile.exported import INPUT_NAMES, ExportedModel, InputSpec
from bertile.onnx_graph import OnnxGraph
from bertile.probing import Probes, opened, probe
from bertile.samples import largest_difference, sample

OPSET = 20
OLDEST_OPSET = 7
TOLERANCE = 1e-3  # largest absolute difference from the original, real tokens only
EXTERNAL_DATA_BYTES = 1_500_000_000
_DTYPES = {onnx.TensorProto.INT64: "int64", onnx.TensorProto.INT32: "int32"}
_DEFAULTS = {"attention_mask": "ones", "token_type_ids": "zeros"}


def normalize(path: Path, directory: Path, config: Config) -> ExportedModel:
    """Write the model in `path` as `directory`/model.onnx in canonical form, with export.json.

    Tokenizer files and config.json beside `path` are copied. Raises ModelError for a file that
    is damaged, not an encoder, or uses an operator that cannot be imported (named), and
    NumericMismatchError if the result differs from the original by more than TOLERANCE.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    original, opset = _read(Path(path))
    graph = OnnxGraph(original)
    batch, length = _axes(graph, path)
    _check_operators(graph)
    graph.clean()
    inputs = _inputs(graph)
    with models.quiet():
        probes = probe(graph, inputs, opset, batch, length)
        max_length, notes = _rewrite(graph, probes, opset)
    _check_operators(graph, canonical=True)
    _name_axes(graph, probes, batch, length)
    model = graph.to_model(OPSET)
    used = {one.name for one in graph.inputs}
    inputs = tuple(one for one in inputs if one.name in used)
    worst = _compare(original, model, inputs, batch, length)
    notes = (*notes, f"differs from the original by at most {worst:.2g} on real tokens")
    _save(model, directory / "model.onnx")
    described = _describe(Path(path), directory, config, graph, probes, inputs)
    return ExportedModel(
        **described, batch=batch, length=length, max_length=length or max_length, notes=notes
    ).write()


def _rewrite(graph: OnnxGraph, probes: Probes, opset: int) -> tuple[int | None, tuple[str, ...]]:
    onnx_rewrites.upgrade_reductions(graph)
    onnx_rewrites.upgrade_splits(graph)
    onnx_rewrites.drop_inference_no_ops(graph)
    onnx_rewrites.expand_attention(graph, lambda name: _is_bool(probes, name))
    canonical = Canonical(graph, probes, max(opset, OPSET))
    canonical.rewrite()
    onnx_rewrites.drop_expands(graph, probes.sizes)
    onnx_rewrites.drop_nan_guards(graph)
    onnx_rewrites.transpose_weights(graph)
    onnx_rewrites.scale_scores(graph)
    onnx_rewrites.split_gemms(graph)
    onnx_rewrites.fuse_layer_norms(graph)
    onnx_rewrites.fuse_gelus(graph)
    notes = tuple(f"the attention mask '{name}' is kept as it is" for name in canonical.notes)
    return canonical.max_length, notes


def _is_bool(probes: Probes, name: str) -> bool:
    found = probes.of(name)
    return found is not None and found[0].dtype == np.bool_


# Reading


def _read(path: Path) -> tuple[onnx.ModelProto, int]:
    """Read a file with its external weights; return it with functions inlined, and its opset."""
    require("compile", "onnx")
    try:
        model = onnx.load(path, load_external_data=False)
    except FileNotFoundError as error:
        raise ModelError(f"there is no file '{path}'") from error
    except OSError as error:
        raise ModelError(f"'{path}' cannot be read: {error.strerror}") from error
    except Exception as error:  # protobuf's DecodeError lies in a module that moves
        raise ModelError(
            f"'{path}' is not an ONNX file, or it is truncated", "export or download it again"
        ) from error
    if not model.graph.node or not model.opset_import:
        raise ModelError(f"'{path}' is not an ONNX file, or it is truncated: it has no operators")
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
        for tensor in model.graph.initializer:
            _check_size(tensor)
    except Exception as error:  # a missing file, or one that is too short
        raise ModelError(
            f"the weights of '{path}' in files beside it are missing or damaged: {error}",
            "keep the .onnx file together with its data files",
        ) from error
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    return _modern(model, path)


def _check_size(tensor: onnx.TensorProto) -> None:
    if tensor.HasField("raw_data"):
        item = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        if len(tensor.raw_data) < int(np.prod(tensor.dims)) * item // 2:
            raise ValueError(f"tensor '{tensor.name}' is cut short")


def _modern(model: onnx.ModelProto, path: Path) -> tuple[onnx.ModelProto, int]:
    opset = max(one.version for one in model.opset_import if one.domain in ("", "ai.onnx"))
    if opset >= 13:
        return model, opset
    try:  # before 13, Softmax and the axes of several operators mean something else
        return onnx.version_converter.convert_version(model, 17), 17
    except Exception as error:
        raise ModelError(
            f"'{path}' has opset {opset}, which cannot be brought up to date",
            "export it again with opset 13 or newer",
        ) from error


def _axes(graph: OnnxGraph, path: Path) -> tuple[int | None, int | None]:
    """Check the inputs' names, types and ranks; return the sizes of the axes that are static."""
    names = [one.name for one in graph.inputs]
    if "input_ids" not in names:
        raise ModelError(f"'{path}' has no input 'input_ids' (it has {', '.join(names) or 'none'})")
    sizes: list[set[int]] = [set(), set()]
    for one in graph.inputs:
        kind = one.type.tensor_type
        if one.name not in INPUT_NAMES:
            raise ModelError(
                f"'{path}' has an input '{one.name}', which is unsupported"
                f"{nearest(one.name, INPUT_NAMES)}"
            )
        if kind.elem_type not in _DTYPES or len(kind.shape.dim) != 2:
            raise ModelError(
                f"input '{one.name}' of '{path}' is no (batch, length) tensor of int32 or int64"
            )
        for axis, dim in enumerate(kind.shape.dim):
            if dim.dim_value > 0:
                sizes[axis].add(dim.dim_value)
    if any(len(one) > 1 for one in sizes):
        raise ModelError(f"the inputs of '{path}' have different static shapes")
    batch, length = (next(iter(one), None) for one in sizes)
    return batch, length


def _inputs(graph: OnnxGraph) -> tuple[InputSpec, ...]:
    given = {one.name: one.type.tensor_type.elem_type for one in graph.inputs}
    below: dict[str, int] = {"attention_mask": 2}
    for node in graph.nodes:
        if is_lookup(graph, node):
            source = source_input(graph, node.input[1])
            if source in ("input_ids", "token_type_ids"):
                below[source] = graph.shape(node.input[0])[0]
    return tuple(
        InputSpec(name, _DTYPES[given[name]], below.get(name), _DEFAULTS.get(name))
        for name in INPUT_NAMES
        if name in given
    )


def _check_operators(graph: OnnxGraph, canonical: bool = False) -> None:
    """Name the first operator that TVM has no converter for."""
    from tvm.relax.frontend.onnx import onnx_frontend  # the stage's only need of TVM

    known = onnx_frontend._get_convert_map()
    for node in graph.nodes:
        name = f"'{node.name or node.output[0]}'"
        if node.domain not in ("", "ai.onnx"):
            raise ModelError(
                f"node {name} is {node.domain}.{node.op_type}, an operator outside the ONNX"
                " standard, which cannot be imported",
                "export the model again without the optimizations of a runtime",
            )
        if any(one.type == onnx.AttributeProto.GRAPH for one in node.attribute):
            raise ModelError(
                f"node {name} is the control-flow operator {node.op_type}, which cannot be imported"
            )
        refused = canonical and node.op_type == "Attention"
        if node.op_type not in known or refused:
            raise ModelError(f"node {name} is the operator {node.op_type}, which cannot be imported")


# Writing


def _name_axes(
    graph: OnnxGraph, probes: Probes, batch: int | None, length: int | None
) -> None:
    """Call the dynamic axes of all inputs and outputs "batch" and "length"."""
    kept = [one for one in graph.inputs if _read_by_any(graph, one.name)]
    graph.inputs = kept
    shape = probes.sizes("input_ids")
    names = {size: name for size, name in zip(shape, ("batch", "length")) if isinstance(size, tuple)}
    for value in [*graph.inputs, *graph.results]:
        kind = value.type.tensor_type
        sizes = probes.sizes(value.name)
        if sizes is None:
            raise ModelError(f"output '{value.name}' changes its rank with the input's shape")
        kind.ClearField("shape")
        for axis, size in enumerate(sizes):
            name = names.get(size, f"{value.name}_{axis}")
            dim = kind.shape.dim.add()
            if isinstance(size, int):
                dim.dim_value = size
            else:
                dim.dim_param = name
    for value in graph.results:
        if value.type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
            raise ModelError(f"output '{value.name}' is not float32", "export the model in float32")


def _read_by_any(graph: OnnxGraph, name: str) -> bool:
    return any(name in node.input for node in graph.nodes)


def _compare(
    original: onnx.ModelProto,
    model: onnx.ModelProto,
    inputs: tuple[InputSpec, ...],
    batch: int | None,
    length: int | None,
) -> float:
    """Return the largest difference from the original over several padded batches."""
    worst = 0.0
    shapes = ((2, 16), (3, 37), (1, 1))
    given = {one.name for one in original.graph.input}
    with opened(original) as before, opened(model) as after:
        names = [one.name for one in after.get_outputs()]
        for seed, shape in enumerate(shapes):
            size = (batch or shape[0], length or shape[1])
            feed = sample(inputs, *size, padding_id=1, seed=seed)
            fed = {name: value for name, value in feed.items() if name in given}
            missing = {
                one.name: np.zeros(size, one.type.replace("tensor(", "").rstrip(")"))
                for one in before.get_inputs()
                if one.name not in fed
            }
            mask = feed.get("attention_mask", np.ones(size, np.int64))
            want = before.run(names, {**fed, **missing})
            for one, other in zip(after.run(names, feed), want):
                worst = max(worst, largest_difference(one, other, mask))
    if not worst <= TOLERANCE:
        raise NumericMismatchError(
            f"the normalised model differs from the original by {worst:.3g},"
            f" more than {TOLERANCE:g}",
            "this is a fault in Bertile's normalizer; please report it",
        )
    return worst


def _save(model: onnx.ModelProto, path: Path) -> None:
    external = model.ByteSize() > EXTERNAL_DATA_BYTES
    location = "model.onnx.data" if external else None
    onnx.save(model, path, save_as_external_data=external, location=location)


def _describe(
    path: Path,
    directory: Path,
    config: Config,
    graph: OnnxGraph,
    probes: Probes,
    inputs: tuple[InputSpec, ...],
) -> dict[str, Any]:
    beside: dict[str, Any] = {}
    for name in ("config.json", *models.TOKENIZER_FILES):
        if (path.parent / name).is_file():
            shutil.copyfile(path.parent / name, directory / name)
    if (path.parent / "config.json").is_file():
        beside = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
    outputs = tuple(graph.outputs)
    head = config.head or _head(outputs, probes, inputs)
    labels = beside.get("id2label", {}) if head.endswith("-classification") else {}
    return {
        "directory": directory,
        "source": str(path),
        "sha256": models.fingerprint(path),
        "family": models.FAMILIES.get(beside.get("model_type"), "unknown"),
        "head": head,
        "inputs": inputs,
        "outputs": outputs,
        "labels": tuple(str(labels[key]) for key in sorted(labels, key=int)),
    }


def _head(outputs: tuple[str, ...], probes: Probes, inputs: tuple[InputSpec, ...]) -> str:
    """Guess the head from the outputs' names and ranks."""
    if "sentence_embedding" in outputs:
        return "embedding"
    if "last_hidden_state" in outputs:
        return "encoder"
    if {"start_logits", "end_logits"} <= set(outputs):
        return "question-answering"
    if "logits" in outputs:
        sizes = probes.sizes("logits") or []
        if len(sizes) == 2:
            return "sequence-classification"
        return "masked-lm" if sizes[-1:] == [inputs[0].below] else "token-classification"
    return "unknown"
