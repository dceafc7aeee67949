"""Pruned checkpoints in the forms in which they are found load as they are, every zero a zero."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from helpers import foreign_forms as floats
from helpers import sparseml_forms

import bertile
from bertile import loader
from bertile.backends.cpu.precision_plan import plan_layers
from bertile.config import Config
from bertile.export import checkpoints, exporter, pruning
from bertile.export.cached import export_cached
from bertile.graph.graph import Graph
from bertile.graph.importer import import_onnx
from bertile.graph.order import optimize
from bertile.lower.dense_weights import dense_weights
from bertile.lower.forms import Forms
from bertile.lower.lowering import tasks
from bertile.numerics.eight_bit import quantize_weights, weight_scales
from bertile.numerics.precision import LayerPlan
from bertile.numerics.zeros import analyse
from bertile.onnx import normalizer
from bertile.onnx.samples import sample, session
from bertile.quantize.observer import layer_inputs
from bertile.quantize.quantizer import Quantizer
from bertile.schedules.task import Task
from bertile.targets import rows

ROW = rows.resolve("native", threads=1)


def weights_of(model) -> list[np.ndarray]:
    """w (K, N) of a BERT's encoder, in the order of `layer_inputs`: Q, K and V side by side."""
    weights = []
    for layer in model.base_model.encoder.layer:
        attention = layer.attention
        qkv = [getattr(attention.self, name) for name in ("query", "key", "value")]
        rest = (attention.output.dense, layer.intermediate.dense, layer.output.dense)
        weights += [
            torch.cat([linear.weight for linear in qkv]).T,
            *(linear.weight.T for linear in rest),
        ]
    return [w.detach().numpy() for w in weights]


def graph_weights(graph: Graph) -> list[np.ndarray]:
    """w (K, N) of the first layers of a graph, as many as `weights_of` gives."""
    return [graph.params[name] for name, _ in layer_inputs(graph)][:8]


def bytes_of(graph: Graph) -> list[np.ndarray]:
    """The integers (K, N) that the kernels of the encoder's layers multiply by."""
    integers = []
    for name, _ in layer_inputs(graph)[:8]:
        plan, w = graph.plan[name], graph.params[name]
        assert plan.precision == "int8"
        task = Task("dense", {"precision": "int8_static" if plan.static else "int8"})
        integers.append(dense_weights(task, [(name, w), ("b", np.zeros(w.shape[1]))], plan)[0][1])
    return integers


# pruneBERT: a checkpoint of Hugging Face from 2020, pruned by movement, each layer differently


def prunebert(directory, head, most=0.95):
    """As `bertarize` of its authors writes it: pytorch_model.bin with the pooler and the buffer
    that transformers had then, and what pruned it in the config.
    """
    model = checkpoints.load(f"synthetic:bert-tiny:{head}").model
    for share, linear in zip(np.linspace(0.8, most, 12), layers_of(model)):
        w = linear.weight.detach().numpy()
        w[~pruning.kept(w, share, "unstructured")] = 0
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["bert.embeddings.position_ids"] = torch.arange(512).unsqueeze(0)
    state["bert.pooler.dense.weight"] = torch.ones(128, 128)
    state["bert.pooler.dense.bias"] = torch.ones(128)
    config = {
        **json.loads(model.config.to_json_string()),
        "architectures": [type(model).__name__],
        "pruning_method": "sigmoied_threshold",
        "mask_init": "constant",
        "mask_scale": 0.0,
    }
    for name in ("transformers_version", "dtype"):
        config.pop(name, None)
    directory.mkdir()
    torch.save(state, directory / "pytorch_model.bin")
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\n")
    return model


def layers_of(model) -> list[torch.nn.Linear]:
    modules = model.base_model.encoder.modules()
    return [module for module in modules if isinstance(module, torch.nn.Linear)]


@pytest.mark.parametrize(
    "head",
    ["question-answering", pytest.param("sequence-classification", marks=pytest.mark.slow)],
)
def test_prunebert_keeps_its_zeros(head, tmp_path):
    model = prunebert(tmp_path / "checkpoint", head)
    exported = exporter.export(tmp_path / "checkpoint", tmp_path / "out", Config())
    assert (exported.head, exported.family) == (head, "bert")
    graph = optimize(import_onnx(exported))
    for w, imported in zip(weights_of(model), graph_weights(graph)):
        assert np.array_equal(imported, w)
        assert analyse(imported).pattern == "unstructured" and analyse(imported).zeros > 0.79
    planned = plan_layers(graph, "int8", ROW)
    for w, integers in zip(weights_of(model), bytes_of(planned)):
        assert not integers[w == 0].any()


@pytest.mark.slow
def test_prunebert_is_compiled_as_it_is(tmp_path):
    """With so few weights left that some neurons have none."""
    prunebert(tmp_path / "checkpoint", "question-answering", 0.99)
    config = Config(cache_dir=str(tmp_path / "cache"), runtime="none")
    bertile.compile(tmp_path / "checkpoint", tmp_path / "out", config)
    manifest = loader.read_manifest(tmp_path / "out")
    assert [output["name"] for output in manifest["outputs"]] == ["start_logits", "end_logits"]
    assert any(note.startswith("zeros: ") and "neurons" in note for note in manifest["notes"])
    assert (tmp_path / "out" / "vocab.txt").exists()


# oBERT: blocks of 4 inputs, trained with quantization, exported by SparseML


@pytest.fixture(scope="module")
def obert(tmp_path_factory):
    """The model in torch, pruned 4x1, and its export in floats."""
    kept = []

    def prune(model):
        pruning.prune(model, "bert", 0.8, "4x1")
        kept.append(model)

    path = tmp_path_factory.mktemp("obert") / "model.onnx"
    floats.write(path, attention="eager", opset=13, change=prune)
    return kept[0], path


def batches():
    random = np.random.default_rng(3)
    mask = (np.arange(24) < np.array([[24], [15]])).astype("int64")
    for _ in range(4):
        yield {
            "input_ids": random.integers(0, 1000, (2, 24)),
            "attention_mask": mask,
            "token_type_ids": random.integers(0, 2, (2, 24)),
        }


@pytest.mark.parametrize("form", sparseml_forms.FORMS)
def test_obert_keeps_its_zeros_its_blocks_and_its_ranges(form, obert, tmp_path):
    model, source = obert
    path = sparseml_forms.write(source, tmp_path / "quantized.onnx", form, list(batches()))
    exported = normalizer.normalize(path, tmp_path / "out", Config())
    assert_close(path, exported, 0.05)
    graph = optimize(import_onnx(exported))
    for w, imported in zip(weights_of(model), graph_weights(graph)):
        assert not imported[w == 0].any()
        assert analyse(imported).pattern == analyse(w).pattern == "4x1"
        # a rounded weight is at most half a step away from what it was, and one at the top
        step = np.abs(w).max() / 127.5
        assert np.abs(imported - w).max() < 1.01 * step
    planned = plan_layers(graph, "int8", ROW)
    for w, integers in zip(weights_of(model), bytes_of(planned)):
        assert not integers[w == 0].any()
        assert analyse(integers).pattern == "4x1"
    assert all(planned.plan[name].static for name, _ in layer_inputs(planned)[:8])
    kinds = [
        task.shape.get("precision") for task in tasks(Forms(planned)) if task.operation == "dense"
    ]
    assert kinds.count("int8_static") == 4


def assert_close(path, exported, tolerance):
    """The canonical model and the file compute nearly the same at real tokens."""
    arrays = sample(exported.inputs, 3, 16, 1, 0)
    mask = arrays["attention_mask"] != 0
    got, want = (
        session(onnx_file).run(["last_hidden_state"], arrays)[0][mask]
        for onnx_file in (exported.onnx_path, path)
    )
    assert np.linalg.norm(got - want) < tolerance * np.linalg.norm(want)


@pytest.mark.slow
@pytest.mark.parametrize("form", sparseml_forms.FORMS)
def test_obert_is_compiled_as_it_is(form, obert, tmp_path):
    path = sparseml_forms.write(obert[1], tmp_path / "quantized.onnx", form, list(batches()))
    bertile.compile(
        path, tmp_path / "out", Config(cache_dir=str(tmp_path / "cache"), runtime="none")
    )
    kernels = loader.read_manifest(tmp_path / "out")["kernels"]
    assert sum(kernel["shape"].get("precision") == "int8_static" for kernel in kernels) == 4


# What stands between a file's weights and a kernel's


def sparse_matrix(zeros=0.9, shape=(96, 40)):
    random = np.random.default_rng(11)
    w = random.standard_normal(shape).astype("float32")
    w *= np.kron(random.random((shape[0] // 4, shape[1])) >= zeros, np.ones((4, 1)))
    w[:, 3] = 0
    w[1:, 4] = 0  # a channel of one weight
    w[:, 5] *= 1e-30
    return w


def test_quantizing_keeps_zeros():
    w = sparse_matrix()
    integers = quantize_weights(w, weight_scales(w))
    assert np.array_equal(integers == 0, np.rint(w / weight_scales(w)) == 0)
    assert not integers[w == 0].any()
    assert np.array_equal(integers.any(0), w.any(0))


@pytest.mark.parametrize("largest", [127, 100, 64, 3])
def test_recovered_scale_keeps_zeros_and_every_other_integer(largest):
    random = np.random.default_rng(largest)
    integers = random.integers(-largest, largest, (96, 40), endpoint=True)
    integers *= sparse_matrix(0.8, (96, 40)) != 0
    w = (integers * random.random(40).astype("float32")).astype("float32")
    scale = weight_scales(w)
    recovered = quantize_weights(w, scale)
    assert np.array_equal(recovered != 0, integers != 0)
    np.testing.assert_array_equal((recovered * scale).astype("float32"), w)


@pytest.mark.parametrize("precision", ["int8", "int8_static"])
def test_smoothing_keeps_zeros(precision):
    w = sparse_matrix()
    smooth = np.random.default_rng(5).uniform(0.05, 20, len(w)).astype("float32")
    ends = (-2.0, 3.0) if precision == "int8_static" else (None, None)
    plan = LayerPlan("int8", *ends, smooth)
    task = Task("dense", {"precision": precision})
    _, integers = dense_weights(task, [("w", w), ("b", np.zeros(w.shape[1], "float32"))], plan)[0]
    assert not integers[w == 0].any() and integers[w != 0].any()


@pytest.mark.slow
def test_planned_smoothing_of_a_pruned_model_keeps_zeros(stages, tmp_path):
    exported = export_cached("synthetic:bert-tiny@0.9:4x1", Config(cache_dir=stages))
    graph = optimize(import_onnx(exported))
    np.savez(tmp_path / "inputs.npz", **sample(exported.inputs, 4, 24, 0))
    config = Config(
        precision="int8", calibrate=str(tmp_path / "inputs.npz"), ranges="minmax", smooth=0.5
    )
    plan = Quantizer(graph, ROW, config).plan(lambda *_: None)
    planned = plan_layers(dataclasses.replace(graph, plan=plan), "int8", ROW)
    weights = graph_weights(graph)
    assert sum(planned.plan[name].smooth is not None for name, _ in layer_inputs(planned)) == 4
    for w, integers in zip(weights, bytes_of(planned)):
        assert np.mean(w == 0) == pytest.approx(0.9, abs=1e-3)
        assert not integers[w == 0].any() and analyse(integers).pattern == "4x1"
