"""Reads an ONNX file: a model that can be normalised, or one error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from bertile.base import tvm_alone
from bertile.base.errors import ModelError, require
from bertile.onnx.graph import OnnxGraph

REWRITTEN = {"Attention", "DFT"}  # operators of which nothing is left in the canonical form
_HALF_BYTES = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4, onnx.TensorProto.FLOAT4E2M1)


def read(path: Path) -> tuple[onnx.ModelProto, int]:
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
        raise ModelError(
            f"'{path}' is not an ONNX file, or it is truncated: it has no operators",
            "export or download it again",
        )
    _load_weights(model, path)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    return _modern(model, path)


def _load_weights(model: onnx.ModelProto, path: Path) -> None:
    for tensor in model.graph.initializer:
        external = onnx.external_data_helper.uses_external_data(tensor)
        location = next(
            (entry.value for entry in tensor.external_data if entry.key == "location"), ""
        )
        try:
            if external:
                onnx.external_data_helper.load_external_data_for_tensor(tensor, str(path.parent))
                tensor.data_location = onnx.TensorProto.DEFAULT
                del tensor.external_data[:]
        except Exception as error:  # onnx refuses a missing file and one outside the directory
            raise ModelError(
                f"'{path}' keeps its weights in '{location}' beside it, which cannot be read",
                "keep the .onnx file together with its data files",
            ) from error
        if _is_short(tensor):
            raise ModelError(
                f"the weight '{tensor.name}' in '{location or path}' is cut short",
                "export or download it again",
            )


def _is_short(tensor: onnx.TensorProto) -> bool:
    if not tensor.HasField("raw_data"):
        return False
    bits = 4 if tensor.data_type in _HALF_BYTES else 8 * _item_size(tensor.data_type)
    return 8 * len(tensor.raw_data) < bits * int(np.prod(tensor.dims, dtype=np.int64))


def _item_size(data_type: int) -> int:
    return int(onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize)


def _modern(model: onnx.ModelProto, path: Path) -> tuple[onnx.ModelProto, int]:
    opset = max(
        imported.version for imported in model.opset_import if imported.domain in ("", "ai.onnx")
    )
    if opset >= 13:
        return model, opset
    try:  # before 13, Softmax and the axes of several operators mean something else
        return onnx.version_converter.convert_version(model, 17), 17
    except Exception as error:
        raise ModelError(
            f"'{path}' has opset {opset}, which cannot be brought up to date",
            "export it again with opset 13 or newer",
        ) from error


def check_operators(graph: OnnxGraph, rewritten: bool = False) -> None:
    """Raise ModelError for the first operator that cannot be imported, with its node's name.

    `rewritten`: also for what the graph loses in the rewriting.
    """
    tvm_alone.load()
    (frontend,) = require("compile", "tvm.relax.frontend.onnx.onnx_frontend")
    known = set(frontend._get_convert_map())
    known = known - REWRITTEN if rewritten else known | REWRITTEN
    for node in graph.nodes:
        name = node.name or node.output[0]
        if node.domain not in ("", "ai.onnx"):
            raise ModelError(
                f"operator {node.domain}.{node.op_type} (node '{name}') is outside the ONNX"
                " standard and cannot be imported",
                "export the model without a runtime's own optimizations",
            )
        subgraphs = any(attribute.type == onnx.AttributeProto.GRAPH for attribute in node.attribute)
        if node.op_type not in known or subgraphs:
            raise ModelError(f"operator {node.op_type} (node '{name}') cannot be imported")
