"""Imports the canonical ONNX model as a Relax module with symbolic batch and length, its weights
split off.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings

import numpy as np
import onnx
import tvm
import tvm_ffi
from tvm import relax
from tvm.relax.frontend.onnx import from_onnx

from bertile.base.errors import ModelError
from bertile.graph.graph import Graph
from bertile.graph.rewriting.dataflow import normalized
from bertile.onnx.exported import ExportedModel

TABLE = "blocks"  # the parameter that says where each block of tokens lies, see loader.token_blocks


def import_onnx(exported: ExportedModel) -> Graph:
    """Import the exported model.

    Scalars, shapes and integer tensors become constants; float tensors with an axis are weights.
    Raises ModelError for an operator that TVM cannot import, and for a file that is no ONNX model.
    """
    try:
        model = onnx.load(exported.onnx_path)
    except Exception as error:
        raise ModelError(f"'{exported.onnx_path}' is not a readable ONNX model: {error}") from error
    mod, values = _from_onnx(model)
    main = mod["main"]
    _check_shapes(normalized(main), exported)
    count = int(main.attrs["num_input"])
    weights, constants = {}, {}
    for var, value in zip(main.params[count:], values):
        array = value.numpy()
        if array.ndim and array.dtype == np.float32 and array.size > 1:
            weights[var.name] = array
        else:
            constants[var.name] = value
    mod = relax.transform.BindParams("main", constants)(mod)
    graph = Graph(mod, weights, exported)
    return graph.with_main(_with_table(graph.main, len(exported.inputs)))


def _check_shapes(main: relax.Function, exported: ExportedModel) -> None:
    """Raise ModelError for a tensor whose shape the request's does not tell: memory is planned by
    batch and length before anything is computed.
    """
    known = {var for param in main.params for var in _variables(param.ty)}
    for binding in (binding for block in main.body.blocks for binding in block.bindings):
        for var in _variables(binding.var.ty):
            if var not in known:
                raise ModelError(
                    f"TVM cannot import operator {_operator(binding.value)}: the size '{var.name}'"
                    " of what it makes depends on the values of inputs",
                    "export the model without it: sizes may depend on the batch and length alone",
                )
    types = list(main.ret_ty.fields) if hasattr(main.ret_ty, "fields") else [main.ret_ty]
    for name, kind in zip(exported.outputs, types):
        if getattr(kind, "shape", None) is None:
            raise ModelError(
                f"TVM cannot tell the shape of the output '{name}': an operator before it makes a"
                " shape of what the model computes",
                "export the model without that output, or without shapes that are computed",
            )


def _variables(kind: tvm.ir.Type) -> list[tvm.tirx.Var]:
    """The symbolic extents in the shape of a tensor."""
    extents = getattr(kind, "shape", None)
    variables: list[tvm.tirx.Var] = []
    for size in extents if isinstance(extents, relax.ShapeExpr) else ():
        tvm_ffi.structural_walk(size, (tvm.tirx.Var, variables.append))
    return variables


def _operator(value: relax.Expr) -> str:
    """An operator's own name: relax.arange is Arange, as in ONNX's names."""
    operator = getattr(getattr(value, "op", None), "name", type(value).__name__)
    return str(operator).rpartition(".")[2].capitalize()


def _from_onnx(model: onnx.ModelProto) -> tuple[tvm.IRModule, list[tvm.runtime.Tensor]]:
    logging.getLogger("relax.frontend.onnx").setLevel(logging.ERROR)
    printed = io.StringIO()  # where the frontend names the operator that it failed at
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(printed):
            warnings.simplefilter("ignore")
            mod = from_onnx(model, keep_params_in_input=True)
    except Exception as error:
        node = re.search(r"[Ee]rror converting operator (\w+)", f"{printed.getvalue()}{error}")
        what = f"operator {node.group(1)}" if node else "a part of the graph"
        detail = str(error).strip().splitlines()
        raise ModelError(
            f"TVM cannot import {what}: {detail[-1] if detail else type(error).__name__}",
            "export the model from Hugging Face with `bertile export`, or run with --debug",
        ) from error
    mod, params = relax.frontend.detach_params(mod)
    return mod, list(params.get("main", []))


def _with_table(main: relax.Function, inputs: int) -> relax.Function:
    """Add the block table after the model's inputs; kernels in lanes need it, nothing else reads
    it.
    """
    blocks = tvm.tirx.Var("m", "int64")
    table = relax.Var(TABLE, relax.TensorType([blocks, 4], "int32"))
    params = [*main.params[:inputs], table, *main.params[inputs:]]
    attrs = {**dict(main.attrs.items()), "num_input": inputs + 1, "global_symbol": "main"}
    return normalized(relax.Function(params, main.body, main.ret_ty, True)).with_attr(attrs)
