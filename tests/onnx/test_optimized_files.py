"""Whole files that ONNX Runtime's transformer optimizer and its quantizer of weights wrote."""

from __future__ import annotations

import logging

import numpy as np
import onnx
import onnxruntime
import pytest
from helpers import foreign_forms

from bertile.config import Config
from bertile.onnx import normalizer
from bertile.onnx.samples import largest_difference, sample, session

optimizer = pytest.importorskip("onnxruntime.transformers.optimizer")
fusion_options = pytest.importorskip("onnxruntime.transformers.fusion_options")
SHAPES = ((1, 1), (3, 37), (2, 16))
EMBEDDED = {"EmbedLayerNormalization", "SkipLayerNormalization", "BiasGelu"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "model.onnx"
    return foreign_forms.write(path, attention="eager")


def fused(path):
    """The operators of a file that are of ONNX Runtime's own domain."""
    graph = onnx.load(path, load_external_data=False).graph
    return {node.op_type for node in graph.node if node.domain == "com.microsoft"}


def assert_canonical(path, directory, tolerance=1e-4):
    """The normalised file computes the same in the operators of Bertile's own export."""
    exported = normalizer.normalize(path, directory, Config())
    before, after = session(path), session(exported.onnx_path)
    types = {argument.name: argument.type for argument in before.get_inputs()}
    for seed, shape in enumerate(SHAPES):
        arrays = sample(exported.inputs, *shape, padding_id=1, seed=seed)
        theirs = {
            name: arrays[name].astype("int32" if "int32" in kind else "int64")
            for name, kind in types.items()
        }
        want = before.run(list(exported.outputs), theirs)
        got = after.run(list(exported.outputs), arrays)
        for ours, expected in zip(got, want, strict=True):
            assert largest_difference(ours, expected, arrays["attention_mask"]) < tolerance
    names = [node.op_type for node in onnx.load(exported.onnx_path).graph.node]
    assert (names.count("Softmax"), names.count("LayerNormalization")) == (2, 5)
    assert names.count("Gelu") == 2
    return exported


@pytest.mark.parametrize(
    ("changes", "operators"),
    [
        ({}, EMBEDDED | {"Attention"}),
        ({"use_multi_head_attention": True}, EMBEDDED | {"MultiHeadAttention"}),
        ({"enable_gelu_approximation": True}, {"FastGelu", "Attention"}),
        ({"enable_embed_layer_norm": False}, {"SkipLayerNormalization", "Attention"}),
    ],
    ids=["as it is", "three tensors", "tanh", "lookups apart"],
)
def test_file_of_the_optimizer_is_as_bertiles_own(plain, tmp_path, changes, operators):
    options = fusion_options.FusionOptions("bert")
    for name, value in changes.items():
        assert hasattr(options, name)
        setattr(options, name, value)
    logging.disable(logging.CRITICAL)
    try:
        model = optimizer.optimize_model(
            str(plain),
            model_type="bert",
            num_heads=2,
            hidden_size=128,
            optimization_options=options,
            opt_level=0,
        )
    finally:
        logging.disable(logging.NOTSET)
    model.save_model_to_file(str(tmp_path / "fused.onnx"))
    assert operators <= fused(tmp_path / "fused.onnx")
    assert_canonical(tmp_path / "fused.onnx", tmp_path / "out", 2e-3 if changes else 1e-4)


def test_file_that_a_session_has_saved_is_as_bertiles_own(plain, tmp_path):
    """Of what a session fuses by itself, at the level that runs on every processor."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "saved.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(plain), options, providers=["CPUExecutionProvider"])
    assert {"FusedMatMul", "BiasGelu"} <= fused(tmp_path / "saved.onnx")
    assert_canonical(tmp_path / "saved.onnx", tmp_path / "out")


def test_weights_of_four_bits_become_floats(plain, tmp_path):
    quantizers = pytest.importorskip("onnxruntime.quantization.matmul_nbits_quantizer")
    quantizer = quantizers.MatMulNBitsQuantizer(onnx.load(plain), 4, 32, is_symmetric=True)
    logging.disable(logging.CRITICAL)
    try:
        quantizer.process()
    finally:
        logging.disable(logging.NOTSET)
    onnx.save(quantizer.model.model, tmp_path / "bits.onnx")
    assert "MatMulNBits" in fused(tmp_path / "bits.onnx")
    exported = assert_canonical(tmp_path / "bits.onnx", tmp_path / "out", 1e-3)
    assert "weights of 4 bits (MatMulNBits) became float32" in exported.notes
    assert np.isfinite(exported.max_length)
