"""Whole quantized models: what is left is in floats, and linear layers keep what the file says."""

import numpy as np
import onnx
import pytest
from helpers import foreign_forms as forms
from helpers.bytes_here import sums_are_exact
from onnx import numpy_helper

import bertile
from bertile.base.errors import NumericMismatchError
from bertile.config import Config
from bertile.graph import importer, order
from bertile.onnx import normalizer
from bertile.onnx.samples import sample, session

OPSET = 17
LINEAR = ["MatMul", "Gemm", "Gather"]
# Norm of the difference by that of the original: one rounding more or less of an 8-bit number at
# four layers' inputs, and of all other activations that the file quantizes besides.
TOLERANCE = 0.06


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    """The two-layer model in floats, as TorchScript writes it."""
    return forms.write(tmp_path_factory.mktemp("floats") / "model.onnx", opset=OPSET)


def reader(padded=True):
    """Batches to calibrate with, of 16 tokens."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self):
            random = np.random.default_rng(0)
            mask = np.arange(16) < np.array([[16], [9 if padded else 16]])
            self.batches = iter(
                {
                    "input_ids": random.integers(0, 1000, (2, 16)),
                    "attention_mask": mask.astype(np.int64),
                    "token_type_ids": random.integers(0, 2, (2, 16)),
                }
                for _ in range(8)
            )

        def get_next(self):
            return next(self.batches, None)

    return Reader()


def quantize(source, path, form, **options):
    """Quantize as ONNX Runtime does; `form` is "dynamic", "QDQ" or "QOperator"."""
    from onnxruntime import quantization

    kinds = {"u8": quantization.QuantType.QUInt8, "s8": quantization.QuantType.QInt8}
    for name in ("weight_type", "activation_type"):
        if name in options:
            options[name] = kinds[options[name]]
    signed = options.get("weight_type", kinds["s8"]) == kinds["s8"]
    options["reduce_range"] = signed and not sums_are_exact()
    if form == "dynamic":
        quantization.quantize_dynamic(source, path, **options)
        return path
    data = reader(options.pop("padded", True))
    options["quant_format"] = quantization.QuantFormat[form]
    options.setdefault("op_types_to_quantize", LINEAR)
    quantization.quantize_static(source, path, data, **options)
    return path


def file_ranges(path):
    """(low, high) of the input of every product with a constant, as the file has them."""
    graph = onnx.load(path).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    makers = {node.output[0]: node for node in graph.node}
    ranges = []
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm"):
            sides = [makers.get(name) for name in node.input[:2]]
            if any(maker is None or maker.op_type != "DequantizeLinear" for maker in sides):
                continue
            scale, zero, weight = *sides[0].input[1:], sides[1].input[0]
        elif node.op_type in ("QLinearMatMul", "QGemm"):
            scale, zero, weight = *node.input[1:3], node.input[3]
        else:
            continue
        if weight in arrays:
            scale, zero = arrays[scale], arrays[zero]
            limits = np.iinfo(zero.dtype)
            ends = [float(scale) * (end - int(zero)) for end in (limits.min, limits.max)]
            ranges.append(tuple(ends))
    return ranges


def assert_same_ranges(got, want):
    assert len(got) == len(want)
    np.testing.assert_allclose(sorted(got), sorted(want), rtol=1e-6)


def plan_of(exported):
    graph = order.optimize(importer.import_onnx(exported))
    assert not [op for op in ("quantize", "fake_quantize") if op in graph.mod.script()]
    return graph


def distance(path, exported, output="last_hidden_state"):
    """Of the canonical model from the file, at real tokens."""
    arrays = sample(exported.inputs, 3, 16, 1, 0)
    mask = arrays["attention_mask"] != 0
    got, want = (session(model).run([output], arrays)[0] for model in (exported.onnx_path, path))
    return np.linalg.norm((got - want)[mask]) / np.linalg.norm(want[mask])


STATIC = {
    "QDQ, per channel, u8": dict(form="QDQ", per_channel=True, activation_type="u8"),
    "QDQ, symmetric s8": dict(
        form="QDQ", activation_type="s8", extra_options={"ActivationSymmetric": True}
    ),
    "QDQ, everything": dict(
        form="QDQ", activation_type="u8", op_types_to_quantize=None, padded=False
    ),
    "QOperator, per channel": dict(form="QOperator", per_channel=True, activation_type="u8"),
    "QOperator, everything": dict(
        form="QOperator", activation_type="u8", op_types_to_quantize=None, padded=False
    ),
}


@pytest.mark.parametrize("form", STATIC)
def test_static_ranges_of_the_file_are_in_the_plan(form, floats, tmp_path):
    path = quantize(floats, tmp_path / "quantized.onnx", **STATIC[form])
    exported = normalizer.normalize(path, tmp_path / "out", Config())
    assert "quantized: 13 linear layers have int8 weights and inputs of a fixed range" in (
        exported.notes
    )
    plan = plan_of(exported).plan
    want = set(file_ranges(path))  # Q, K and V share theirs
    got = [(layer.low, layer.high) for layer in plan.values()]
    pooler = [ends for ends in want if not any(np.allclose(ends, other) for other in got)]
    assert len(pooler) == 1  # one row a sequence: it stays in floats
    assert_same_ranges(got, want - set(pooler))
    if "everything" not in form:
        assert distance(path, exported) < TOLERANCE


@pytest.mark.parametrize("kind", ["s8", "u8"])
def test_dynamic_model_has_a_dynamic_plan(kind, floats, tmp_path):
    path = tmp_path / "quantized.onnx"
    quantize(floats, path, "dynamic", per_channel=kind == "s8", weight_type=kind)
    exported = normalizer.normalize(path, tmp_path / "out", Config())
    plan = plan_of(exported).plan
    assert len(plan) == 8
    assert {(layer.precision, layer.static, layer.smooth) for layer in plan.values()} == {
        ("int8", False, None)
    }
    assert any("leave -127" in note for note in exported.notes) == (kind == "u8")
    assert distance(path, exported) < 0.02


@pytest.mark.parametrize("form", ["QDQ", "dynamic"])
def test_weights_are_exactly_scale_times_integers(form, floats, tmp_path):
    path = quantize(floats, tmp_path / "quantized.onnx", form, per_channel=True)
    exported = normalizer.normalize(path, tmp_path / "out", Config())
    graph = onnx.load(path).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    integers = [
        (name, array)
        for name, array in arrays.items()
        if array.dtype == np.int8 and array.shape == (128, 512)
    ]
    weights = [array for array in plan_of(exported).params.values() if array.shape == (128, 512)]
    assert len(weights) == len(integers) == 2
    for name, array in integers:
        scale = arrays[name.replace("_quantized", "_scale")]
        assert any(np.array_equal(array * scale, other) for other in weights)


def test_model_whose_masks_are_quantized_away_is_refused(floats, tmp_path):
    path = tmp_path / "quantized.onnx"
    quantize(floats, path, "QDQ", op_types_to_quantize=None)  # -inf in the calibration
    with pytest.raises(NumericMismatchError, match="quantized original") as caught:
        normalizer.normalize(path, tmp_path / "out", Config())
    assert "op_types_to_quantize" in str(caught.value)
    assert not (tmp_path / "out" / "model.onnx").exists()


def test_mask_that_calibration_never_saw_is_named(floats, tmp_path):
    path = tmp_path / "quantized.onnx"
    quantize(floats, path, "QDQ", op_types_to_quantize=None, padded=False, activation_type="u8")
    exported = normalizer.normalize(path, tmp_path / "out", Config())
    assert any(note.startswith("attention_mask changes nothing") for note in exported.notes)


def without_rounding(path):
    """The canonical model without what rounds its activations: weights are floats already."""
    model = onnx.load(path)
    makers = {name: node for node in model.graph.node for name in node.output}
    rounded = {
        node.output[0]: makers[node.input[0]].input[0]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and "QuantizeLinear" in makers[node.input[0]].op_type
    }
    assert rounded
    for node in model.graph.node:
        node.input[:] = [rounded.get(name, name) for name in node.input]
    return model.SerializeToString()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["QDQ", "QOperator", "dynamic"])
def test_compiled_model_computes_what_the_file_says(form, floats, tmp_path):
    path = quantize(floats, tmp_path / "quantized.onnx", form, per_channel=True)
    assert_compiled(path, tmp_path)


def assert_compiled(path, tmp_path):
    """Every layer before the pooler is in bytes, and near what ONNX Runtime computes.

    Kernels round as the canonical model does, or to the number beside it where float32 sums in
    another order have come to the other side of a half; one such step brings more of them about in
    every layer behind it, eight roundings deep, until all roundings are others. (1e-5 more or less
    in the weights of the LayerNorms moves the canonical model itself by 0.7 to 1.7%.) So there is
    no bound below that of two computations of the same floats with rounding errors e that are
    independent of each other: √2 |e|. That the kernels' own error is not larger than e is asserted
    besides: over thousands of values, |e| differs by a few percent from draw to draw. A range for
    each token rounds more finely than one for all.
    """
    config = Config(
        cache_dir=str(tmp_path / "cache"), log_dir=str(tmp_path / "log"), shipped_log=False
    )
    bertile.compile(str(path), tmp_path / "bundle", config)
    exported = normalizer.normalize(path, tmp_path / "out", Config())
    arrays = sample(exported.inputs, 3, 16, 1, 0)
    with bertile.load(tmp_path / "bundle") as model:
        got = model(**arrays)["last_hidden_state"]
        kernels = model.manifest["kernels"]
    assert sum("int8" in kernel["shape"].get("precision", "") for kernel in kernels) == 4
    want, unrounded = (
        session(source).run(["last_hidden_state"], arrays)[0]
        for source in (exported.onnx_path, without_rounding(exported.onnx_path))
    )
    mask = arrays["attention_mask"] != 0
    error = np.linalg.norm((want - unrounded)[mask])
    assert 0.001 < error / np.linalg.norm(unrounded[mask]) < 0.05
    assert np.linalg.norm((got - want)[mask]) < 2**0.5 * error
    assert np.linalg.norm((got - unrounded)[mask]) < 1.1 * error


@pytest.mark.slow
def test_nncf_model_is_compiled_with_its_smoothing(floats, tmp_path):
    nncf = pytest.importorskip("nncf", reason="nncf is not installed")
    batches = [{name: array[:1] for name, array in batch.items()} for batch in reader().batches]
    quantized = nncf.quantize(
        onnx.load(floats), nncf.Dataset(batches), model_type=nncf.ModelType.TRANSFORMER
    )
    path = tmp_path / "quantized.onnx"
    onnx.save(quantized, path)
    plan = plan_of(normalizer.normalize(path, tmp_path / "out", Config())).plan
    assert len(plan) == 8 and all(
        layer.static and layer.smooth is not None for layer in plan.values()
    )
    assert_compiled(path, tmp_path)
