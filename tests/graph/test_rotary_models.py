"""Models with rotary positions, through the whole program, against ONNX Runtime."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import transformers
from helpers import foreign_forms as forms

import bertile
from bertile import backends, loader
from bertile.backends.cpu import precision_plan
from bertile.config import Config
from bertile.graph.importer import import_onnx
from bertile.graph.order import optimize
from bertile.lower import lowering
from bertile.lower.forms import Forms
from bertile.onnx import normalizer
from bertile.onnx.samples import largest_difference, session
from bertile.run.cuda import emulator
from bertile.targets.rows import resolve
from bertile.tune.log.tuning_log import TuningLog

LIMIT = 200
SHAPES = ((1, 1), (3, 37), (2, 16), (5, 150), (1, LIMIT))
TOLERANCE = 2e-5  # two layers in float32
HEADS, SIZE = 2, 10


def rotate_half(x):
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


class Rotary(torch.nn.Module):
    """cos and sin (1, S, D) as transformers computes them, or cut from a buffer."""

    def __init__(self, base: float, cached: bool) -> None:
        super().__init__()
        frequencies = base ** (-torch.arange(0, SIZE, 2).float() / SIZE)
        self.register_buffer("frequencies", frequencies, persistent=False)
        angles = torch.arange(LIMIT)[:, None] * torch.cat([frequencies, frequencies])
        self.register_buffer("cached", angles if cached else None, persistent=False)

    def forward(self, ids):
        if self.cached is not None:
            angles = self.cached[: ids.shape[1]][None]
        else:
            places = torch.arange(ids.shape[1])[None].float()
            angles = self.frequencies[None, :, None].expand(1, -1, 1) @ places[:, None, :]
            angles = torch.cat([angles.transpose(1, 2)] * 2, dim=-1)
        return angles.cos(), angles.sin()


class Layer(torch.nn.Module):
    def __init__(self, window: int | None) -> None:
        super().__init__()
        width, self.window = HEADS * SIZE, window
        self.query, self.key, self.value, self.out = (
            torch.nn.Linear(width, width) for _ in range(4)
        )
        self.first, self.second = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.up, self.down = torch.nn.Linear(width, 3 * width), torch.nn.Linear(3 * width, width)

    def forward(self, x, mask, cos, sin):
        batch, length, width = x.shape
        q, k, v = (
            project(x).view(batch, length, HEADS, SIZE).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        q, k = (heads * cos + rotate_half(heads) * sin for heads in (q, k))
        scores = q @ k.transpose(2, 3) * SIZE**-0.5 + mask
        if self.window:
            places = torch.arange(length)
            far = (places[None] - places[:, None]).abs() > self.window
            scores = scores.masked_fill(far, torch.finfo(torch.float32).min)
        context = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width)
        x = self.first(x + self.out(context))
        return self.second(x + self.down(torch.nn.functional.gelu(self.up(x))))


class Model(torch.nn.Module):
    """Two layers, the second of which may see a window alone, as ModernBERT's do in turn."""

    def __init__(self, window: int | None = None, cached: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        width = HEADS * SIZE
        self.words, self.norm = torch.nn.Embedding(50, width), torch.nn.LayerNorm(width)
        self.rotary = Rotary(100.0, cached)
        self.layers = torch.nn.ModuleList([Layer(None), Layer(window)])

    def forward(self, input_ids, attention_mask):
        x, (cos, sin) = self.norm(self.words(input_ids)), self.rotary(input_ids)
        mask = (1.0 - attention_mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
        for layer in self.layers:
            x = layer(x, mask, cos, sin)
        return x


def write(path: Path, model: Model, dynamo=False, dynamic=True, limit: int | None = LIMIT) -> Path:
    names, output = ["input_ids", "attention_mask"], "last_hidden_state"
    options = {"input_names": names, "output_names": [output]}
    if dynamo:
        axes = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("seq", min=1, max=LIMIT)}
        options |= {"dynamo": True, "external_data": False, "opset_version": 18, "verbose": False}
        options |= {"dynamic_shapes": (dict(axes), dict(axes))}
    else:
        options |= {"dynamo": False, "opset_version": 17}
        if dynamic:
            options["dynamic_axes"] = {tensor: {0: "b", 1: "s"} for tensor in (*names, output)}
    if limit:
        text = json.dumps({"max_position_embeddings": limit})
        (path.parent / "config.json").write_text(text)
    arrays = tuple(torch.ones(2, 24, dtype=torch.int64) for _ in names)
    forms.run_quietly(model.eval(), arrays, path, options)
    return path


def equals_original(path: Path, directory: Path, shapes=SHAPES, **config):
    """The bundle of a file, after a check that it computes what ONNX Runtime does."""
    config = Config(cache_dir=str(directory / "cache"), **config)
    bertile.compile(str(path), directory / "bundle", config)
    model, original = bertile.load(directory / "bundle"), session(path)
    rng = np.random.default_rng(0)
    for batch, length in shapes:
        ids = rng.integers(0, 50, (batch, length))
        mask = np.arange(length) < rng.integers(1, length + 1, (batch, 1))  # unequal lengths
        mask[0] = True
        arrays = {"input_ids": ids, "attention_mask": mask.astype("int64")}
        (want,) = original.run(None, arrays)
        hidden = model(**arrays)["last_hidden_state"]
        assert largest_difference(hidden, want, mask) < TOLERANCE, (batch, length)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(("attention", "dynamo"), [("eager", False), ("sdpa", True)])
def test_modernbert_of_transformers_equals_onnxruntime(tmp_path, attention, dynamo):
    """Windows and two kinds of rotary positions; Q, K and V of one layer, and gated networks."""
    config = transformers.ModernBertConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=LIMIT,
        local_attention=16,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "cls_token_id"), 0),
        **dict.fromkeys(("eos_token_id", "sep_token_id"), 1),
    )
    torch.manual_seed(0)
    model = transformers.ModernBertModel(config)
    model.set_attn_implementation(attention)

    class Positional(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            outputs = self.model(input_ids=input_ids, attention_mask=attention_mask)
            return outputs.last_hidden_state

    bundle = equals_original(write(tmp_path / "m.onnx", Positional(), dynamo), tmp_path)
    dense = kernels(bundle, "dense")
    assert any(k.get("turned") for k in dense) and any(k.get("gated") for k in dense)
    assert not bundle.manifest["fallthrough"] or "matmul" not in str(bundle.manifest["fallthrough"])


def kernels(model, operation: str) -> list[dict]:
    return [k["shape"] for k in model.manifest["kernels"] if k["operation"] == operation]


@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_rotary_positions_are_turned_by_the_product_of_qkv_beside_a_window(tmp_path, dynamo):
    model = equals_original(write(tmp_path / "m.onnx", Model(window=20), dynamo), tmp_path)
    assert [k.get("window") for k in kernels(model, "attention")] == [None, 20]
    width = HEADS * SIZE
    expected = {"inputs": width, "outputs": 3 * width, "turned": 2 * HEADS, "head_size": SIZE}
    assert expected.items() <= kernels(model, "dense")[0].items()
    assert not kernels(model, "rotary")
    left = {entry.partition(" ")[0] for entry in model.manifest["fallthrough"]}
    assert not left & {"matmul", "concat", "negative", "sin", "cos", "nn.softmax"}


@pytest.mark.slow
def test_static_sizes_have_rotary_positions_too(tmp_path):
    path = write(tmp_path / "m.onnx", Model(window=20), dynamic=False)
    model = equals_original(path, tmp_path, ((2, 24),))
    assert kernels(model, "dense")[0]["turned"] == 2 * HEADS


def test_angles_of_a_buffer_are_found(tmp_path):
    path = write(tmp_path / "m.onnx", Model(cached=True))
    exported = normalizer.normalize(path, tmp_path / "out", Config())
    tasks = lowering.tasks(Forms(optimize(import_onnx(exported))))
    assert any("turned" in task.shape for task in tasks) and exported.max_length == LIMIT


def test_a_model_without_a_limit_gets_that_of_the_table(tmp_path):
    path = write(tmp_path / "m.onnx", Model(), limit=None)
    exported = normalizer.normalize(path, tmp_path / "out", Config())
    assert exported.max_length == 8192
    operators = [node.op_type for node in onnx.load(exported.onnx_path).graph.node]
    assert not {"Range", "Sin", "Cos"} & set(operators)


def test_attention_behind_rotary_positions_is_in_bfloat16_too(tmp_path):
    exported = normalizer.normalize(write(tmp_path / "m.onnx", Model()), tmp_path / "out", Config())
    row = resolve("x86-avx512-bf16", threads=1)
    log = TuningLog([tmp_path], print)
    graph = precision_plan.plan_layers(optimize(import_onnx(exported)), "bf16", row, log, "off")
    tasks = lowering.tasks(backends.of(row).forms(graph))
    (product,) = (task.shape for task in tasks if "turned" in task.shape)
    expected = {"precision": "bf16", "writes": "to_bf16", "values_from": 2 * HEADS * SIZE}
    assert expected.items() <= product.items()
    precisions = {task.shape.get("precision") for task in tasks if task.operation == "attention"}
    assert precisions == {"bf16"}


def test_rotary_positions_on_a_gpu_are_turned_by_the_product_of_qkv(tmp_path):
    if lacks := emulator.missing():
        pytest.skip(lacks)
    path = write(tmp_path / "m.onnx", Model(window=20))
    config = Config(target="cuda-sm90", precision="fp16", cache_dir=str(tmp_path / "cache"))
    bertile.compile(str(path), tmp_path / "bundle", config)
    manifest = loader.read_manifest(tmp_path / "bundle")
    assert manifest["check"]["max_abs_difference"] <= 0.01
    shapes = [kernel["shape"] for kernel in manifest["kernels"]]
    assert [shape["precision"] for shape in shapes if "turned" in shape] == ["fp16"]
    assert {shape.get("window") for shape in shapes if "heads" in shape} == {None, 20}
    plan = json.loads((tmp_path / "bundle" / "plan.json").read_text())
    entries = [step["entry"] for step in plan["steps"]]
    assert entries.count(f"tokens_in_{SIZE}_fp32") == 2  # cos and sin, once for all layers
