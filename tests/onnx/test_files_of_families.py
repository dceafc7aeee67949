"""ONNX files of every family of later years, in every form that exporters and optimizers write."""

from __future__ import annotations

import logging

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from helpers import odd_models
from tvm import relax

from bertile.config import Config
from bertile.export import synthetic
from bertile.families.family import BY_ANGLE, BY_DISTANCE
from bertile.families.table import FAMILIES, named
from bertile.graph import importer, order
from bertile.loader import SIDES
from bertile.onnx import normalizer
from bertile.onnx.samples import largest_difference, session

# Values that are turned too keep attention out of a kernel; no known checkpoint has such.
CHANGES = {"roformer": {"rotary_value": False}}
YOUNG = [
    family for family in FAMILIES if family.positions in (BY_ANGLE, BY_DISTANCE) or family.causal
]
FORMS = ("dynamo", "torchscript", "optimum", "optimizer", "session", "four bits")
QUICK = (("deberta", "torchscript"), ("roformer", "torchscript"), ("nomic-bert", "optimizer"))
# Operators of ONNX Runtime's own that the last three forms have at the least.
FUSED = {
    "optimizer": {"SkipLayerNormalization", "SkipSimplifiedLayerNormalization"},
    "session": {"FusedMatMul", "BiasGelu", "QuickGelu", "FastGelu", "Gelu"},
    "four bits": {"MatMulNBits"},
}
SHAPES = ((1, 1), (3, 37), (2, 16))
TOLERANCE = 5e-5  # relative to the largest value
CASES = [
    pytest.param(
        family.name,
        form,
        marks=[] if (family.name, form) in QUICK else [pytest.mark.slow],
    )
    for family in YOUNG
    for form in FORMS
    # GPT-2 multiplies by Gemm, of which the quantizer of weights makes nothing
    if (family.name, form) != ("gpt2", "four bits")
]


def tiny(family):
    """The tiny model of a family as transformers runs it."""
    sizes = synthetic.config(f"{family}-tiny")
    sizes.update(CHANGES.get(family, {}))
    model = synthetic.build(transformers.AutoModel, sizes)
    if model._supports_sdpa:
        model.set_attn_implementation("sdpa")
    return model


def write(model, family, form, directory):
    """Write the file of that form, by way of what it is made of."""
    boxes = getattr(model.config, "max_2d_position_embeddings", 0)
    path = directory / f"{form}.onnx".replace(" ", "_")
    if form == "optimum":
        return _by_optimum(model, directory)
    if form in ("dynamo", "torchscript"):
        options = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
        takes = model.forward.__code__.co_varnames
        options = options if "use_cache" in takes or named(family).causal else {}
        odd_models.write_onnx(model, path, form == "dynamo", boxes, **options)
        return path
    plain = write(model, family, "torchscript", directory)
    logging.disable(logging.CRITICAL)
    try:
        {"optimizer": _optimize, "session": _save, "four bits": _quantize}[form](plain, path, model)
    finally:
        logging.disable(logging.NOTSET)
    return path


def _by_optimum(model, directory):
    exporters = pytest.importorskip(
        "optimum.exporters.onnx", reason="optimum-onnx takes no transformers from 4.58 on"
    )
    from optimum.exporters.tasks import TasksManager

    if model.config.model_type not in TasksManager._SUPPORTED_MODEL_TYPE:
        pytest.skip(f"Optimum exports no models of type {model.config.model_type}")
    exporters.onnx_export_from_model(
        model, directory / "optimum", task="feature-extraction", do_validation=False
    )
    return directory / "optimum" / "model.onnx"


def _optimize(plain, path, model):
    optimizer = pytest.importorskip("onnxruntime.transformers.optimizer")
    kind = "gpt2" if model.config.model_type == "gpt2" else "bert"
    heads, width = model.config.num_attention_heads, model.config.hidden_size
    optimizer.optimize_model(
        str(plain), model_type=kind, num_heads=heads, hidden_size=width, opt_level=0
    ).save_model_to_file(str(path))


def _save(plain, path, model):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(plain), options, providers=["CPUExecutionProvider"])


def _quantize(plain, path, model):
    quantizers = pytest.importorskip("onnxruntime.quantization.matmul_nbits_quantizer")
    quantizer = quantizers.MatMulNBitsQuantizer(onnx.load(plain), 4, 32, is_symmetric=True)
    quantizer.process()
    onnx.save(quantizer.model.model, path)


def operators(exported):
    """How often each operator is in the fused graph."""
    counts: dict[str, int] = {}

    def count(expr):
        if isinstance(expr, relax.Call) and hasattr(expr.op, "name"):
            counts[expr.op.name] = counts.get(expr.op.name, 0) + 1

    graph = order.optimize(importer.import_onnx(exported))
    relax.analysis.post_order_visit(graph.mod["main"], count)
    return counts


def feed(exported, arrays):
    """What a canonical file reads of a batch: boxes by their sides, places counted."""
    rows, length = arrays["input_ids"].shape
    known = {
        "token_type_ids": np.zeros((rows, length), np.int64),
        "position_ids": np.broadcast_to(np.arange(length), (rows, length)),
        **{side: arrays["bbox"][..., i] for i, side in enumerate(SIDES) if "bbox" in arrays},
        **arrays,
    }
    return {spec.name: known[spec.name].astype(spec.dtype) for spec in exported.inputs}


@pytest.mark.parametrize(("family", "form"), CASES)
def test_file_has_its_attention_in_kernels_and_equals_transformers(tmp_path, family, form):
    model = tiny(family)
    path = write(model, family, form, tmp_path)
    ours = {node.op_type for node in onnx.load(path).graph.node if node.domain == "com.microsoft"}
    assert not FUSED.get(form) or ours & FUSED[form]
    exported = normalizer.normalize(path, tmp_path / "out", Config())
    counts, layers = operators(exported), model.config.num_hidden_layers
    assert counts["bertile.attention"] == layers
    assert not counts.keys() & {"relax.nn.softmax", "relax.nn.layer_norm", "relax.erf"}
    if form == "four bits":
        return  # weights are others than the model's; the normalizer has compared it with the file
    runner, causal = session(exported.onnx_path), named(family).causal
    has_positions = any(spec.name == "position_ids" for spec in exported.inputs)
    for shape in SHAPES:
        for padding in ("right",) if has_positions else odd_models.PADDINGS:
            boxes = getattr(model.config, "max_2d_position_embeddings", 0)
            arrays = odd_models.batch(*shape, padding, causal, boxes)
            with torch.no_grad():
                want = odd_models.answers(model, arrays)["last_hidden_state"]
            (got,) = runner.run(["last_hidden_state"], feed(exported, arrays))
            limit = TOLERANCE * max(1, np.abs(want).max())
            assert largest_difference(got, want, arrays["attention_mask"]) <= limit, (
                shape,
                padding,
            )
