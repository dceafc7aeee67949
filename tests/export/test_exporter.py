"""Every family and head: ONNX Runtime on the exported model against the plain torch model."""

import dataclasses
import inspect
import json

import numpy as np
import onnx
import pytest
import torch
import transformers
from helpers import family_models
from helpers.family_models import HEAD_OF, NAMES, PAIRS
from transformers.models.bert import modeling_bert

from bertile.base.errors import ModelError, NumericMismatchError
from bertile.config import HEADS, Config
from bertile.export import checkpoints, exporter, synthetic, torch_module
from bertile.families.family import CAUSAL
from bertile.loader import SIDES
from bertile.onnx.exported import ExportedModel, read
from bertile.onnx.masks import MASKED
from bertile.onnx.samples import largest_difference, sample, session

# Two layers in float32, summed in another order than torch does: some units of the last place.
TOLERANCE = 5e-5
OF_QUICK = [(family, HEAD_OF[family]) for family in NAMES]
QUICK = [(f"{family}-tiny", head) for family, head in OF_QUICK]
REST = [
    *(case for case in ((f"{family}-tiny", head) for family, head in PAIRS) if case not in QUICK),
    ("bert-odd", "embedding"),  # tests/test_compile.py exports its encoder
]
each_family = pytest.mark.parametrize(("family", "head"), OF_QUICK, ids=NAMES)


@pytest.fixture
def exports(stages):
    """Export a synthetic model's directory once for all tests that ask for it."""
    return lambda name, head: family_models.exported(name, head, stages)


def compare(exported, name, head, shapes):
    runner, model = session(exported.onnx_path), family_models.untouched(name, head)
    for seed, (batch, length) in enumerate(shapes):
        arrays = sample(exported.inputs, batch, length, family_models.padding_id(exported), seed)
        want = family_models.torch_outputs(model, head, arrays)
        for output, got in zip(exported.outputs, runner.run(list(exported.outputs), arrays)):
            difference = largest_difference(got, want[output], arrays["attention_mask"])
            assert difference < TOLERANCE, (output, batch, length)


def test_quick_cases_have_every_family_and_every_head():
    assert [name for name, _ in QUICK] == [f"{family}-tiny" for family in NAMES]
    assert {head for _, head in QUICK} == set(HEADS) - {CAUSAL}


@pytest.mark.parametrize(
    ("name", "head"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)]
)
def test_export_equals_torch_at_any_batch_and_length(exports, name, head):
    exported = exports(name, head)
    assert exported.max_length == 512
    compare(exported, name, head, [(1, 1), (3, 37), (7, 16), (1, exported.max_length)])


@each_family
def test_export_names_inputs_and_outputs_of_each_family(exports, family, head):
    exported = exports(f"{family}-tiny", head)
    model = family_models.untouched(f"{family}-tiny", head)
    takes = inspect.signature(model.forward).parameters
    types = "token_type_ids" in takes and model.config.type_vocab_size > 1
    boxes = SIDES if "bbox" in takes else ()
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if types else []), *boxes]
    assert [spec.name for spec in exported.inputs] == names
    places = getattr(model.config, "max_2d_position_embeddings", 0)
    below = {"input_ids": 1000, **dict.fromkeys(names[1:], 2), **dict.fromkeys(boxes, places)}
    assert {spec.name: spec.below for spec in exported.inputs} == below
    defaults = [None, "ones", *["zeros"] * 5]
    assert [spec.default for spec in exported.inputs] == defaults[: len(names)]
    arrays = sample(exported.inputs, 1, 3, family_models.padding_id(exported))
    assert exported.outputs == tuple(family_models.torch_outputs(model, head, arrays))
    assert (exported.family, exported.head) == (family, head)


def _refuse_four_axes(mask):
    if mask.dim() != 2:
        raise ValueError(f"Wrong shape for attention_mask (shape {tuple(mask.shape)})")


def _take_real_for_padding(mask):
    """Without a word, what is added to a real key, 0, is taken for one that is padding."""


@pytest.mark.parametrize("look", [_refuse_four_axes, _take_real_for_padding])
def test_mask_that_the_model_builds_of_two_axes_is_written_as_ours(monkeypatch, tmp_path, look):
    """As models of transformers before 5 do, which take no mask of (batch, 1, 1, length)."""

    def build(config, inputs_embeds, attention_mask, **others):
        look(attention_mask)
        batch, length = attention_mask.shape[0], attention_mask.shape[-1]
        padded = (attention_mask == 0).reshape(batch, 1, 1, length)
        return padded.to(inputs_embeds.dtype) * torch.finfo(torch.float32).min

    monkeypatch.setattr(modeling_bert, "create_bidirectional_mask", build)
    exported = exporter.export("synthetic:bert-tiny", tmp_path, Config())
    compare(exported, "bert-tiny", "encoder", [(1, 1), (3, 37)])
    graph = onnx.load(exported.onnx_path).graph
    scalars = [onnx.numpy_helper.to_array(t) for t in graph.initializer if not t.dims]
    assert min(scalars) == np.float32(MASKED)


@each_family
def test_export_imports_into_tvm_with_symbolic_axes(exports, family, head):
    frontend = pytest.importorskip("tvm.relax.frontend.onnx")
    exported = exports(f"{family}-tiny", head)
    mod = frontend.from_onnx(onnx.load(exported.onnx_path), keep_params_in_input=True)
    shape = mod["main"].params[0].ty.shape
    assert [str(axis) for axis in shape] == ["batch", "length"]


@each_family
def test_export_writes_the_canonical_operators(exports, family, head):
    model = onnx.load(exports(f"{family}-tiny", head).onnx_path)
    operators = [node.op_type for node in model.graph.node]
    norms = calls(family_models.untouched(f"{family}-tiny", head), "LayerNorm")
    assert operators.count("LayerNormalization") == norms >= 5
    layers = family_models.untouched(f"{family}-tiny").config.num_hidden_layers
    activations = operators.count("Gelu") + operators.count("Sigmoid")
    assert operators.count("Softmax") == layers
    # one a layer, and one in the head of a masked LM or of ModernBERT
    assert layers <= activations <= layers + 1
    of_boxes = {"Where"} if family == "layoutlm" else set()  # none ends before it begins
    leftover = {"Gemm", "Erf", "Where", "Expand", "Range", "Identity"} - of_boxes
    assert not leftover & set(operators)
    assert [opset.version for opset in model.opset_import if opset.domain == ""] == [20]
    assert not any(node.metadata_props for node in model.graph.node)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        # the scores of each question's choices are made a row of their own, of one
        if node.op_type == "Reshape" and (head, node.output[0]) != ("multiple-choice", "logits"):
            target = onnx.numpy_helper.to_array(constants[node.input[1]]).tolist()
            # heads stay apart in products by distance, (B, H, S, R) → (B, H, S R)
            assert target[:2] == [0, 0] or target == [0, 2, -1]


def calls(model, kind):
    """How often modules of classes whose names end so are called in one forward."""
    called = []
    for module in model.modules():
        if type(module).__name__.endswith(kind):
            module.register_forward_hook(lambda *_: called.append(1))
    model(input_ids=torch.ones(1, 2, dtype=torch.int64))
    return len(called)


def test_export_masks_padding_so_that_it_changes_nothing(exports):
    exported = exports("bert-tiny", "encoder")
    arrays = sample(exported.inputs, 1, 9, 0)
    longer = {key: np.pad(value, ((0, 0), (0, 4))) for key, value in arrays.items()}
    longer["input_ids"][:, 9:] = 7
    runner = session(exported.onnx_path)
    short, long = (runner.run(None, inputs)[0] for inputs in (arrays, longer))
    assert largest_difference(long[:, :9], short, arrays["attention_mask"]) < TOLERANCE


def test_export_writes_a_description_that_reads_back(exports):
    exported = exports("electra-tiny", "token-classification")
    assert read(exported.directory) == exported
    assert exported.labels == ("LABEL_0", "LABEL_1")
    assert "torch differ by at most" in exported.notes[-1]
    assert json.loads((exported.directory / "config.json").read_text())["model_type"] == "electra"


def test_read_refuses_a_damaged_description(tmp_path):
    (tmp_path / "export.json").write_text('{"source": "x"}')
    with pytest.raises(ModelError, match="does not describe an exported model"):
        read(tmp_path)


def test_export_takes_a_model_object_and_prints_nothing(tmp_path, capfd):
    sizes = synthetic.config("distilbert-tiny")
    sizes.update({"n_layers": 1, "dim": 32, "hidden_dim": 48})
    model = synthetic.build(transformers.AutoModelForQuestionAnswering, sizes).train()
    exported = exporter.export(model, tmp_path, Config())
    assert capfd.readouterr() == ("", "")
    assert exported.outputs == ("start_logits", "end_logits")
    assert exported.source == "DistilBertForQuestionAnswering" and model.training


@pytest.mark.slow
def test_export_minilm_has_its_tokenizer_and_pools_by_mean(tmp_path):
    exported = exporter.export("minilm", tmp_path, Config())
    written = {path.name for path in tmp_path.iterdir()}
    assert {"model.onnx", "tokenizer.json", "config.json"} <= written
    assert (exported.head, exported.outputs) == ("embedding", ("sentence_embedding",))
    arrays = sample(exported.inputs, 3, 21, 0)
    embeddings = session(exported.onnx_path).run(None, arrays)[0]
    model = checkpoints.load("minilm").model
    with torch.no_grad():
        hidden = model(**{key: torch.from_numpy(array) for key, array in arrays.items()})[0].numpy()
    weights = arrays["attention_mask"][:, :, None]
    want = (hidden * weights).sum(1) / weights.sum(1)
    want /= np.linalg.norm(want, axis=1, keepdims=True)
    assert np.abs(embeddings - want).max() < 1e-6


def test_export_keeps_tanh_gelu_as_one_operator(exports):
    model = onnx.load(exports("albert-tiny", HEAD_OF["albert"]).onnx_path)
    kinds = [node.attribute[0].s for node in model.graph.node if node.op_type == "Gelu"]
    assert kinds == [b"tanh", b"tanh"]


def test_pool_cls_takes_the_first_token():
    hidden, mask = torch.randn(2, 3, 4), torch.ones(2, 3)
    assert torch.equal(torch_module.pool(hidden, mask, "cls"), hidden[:, 0])


def test_export_fails_when_the_onnx_model_differs_from_torch(exports, tmp_path, monkeypatch):
    other = exports("bert-tiny", "encoder")

    def write_other_weights(module, exported):
        model = onnx.load(other.onnx_path)
        bias = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 1)
        bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 1, bias.name))
        onnx.save(model, exported.onnx_path)
        return exported, ()

    monkeypatch.setattr(exporter, "_write_onnx", write_other_weights)
    with pytest.raises(NumericMismatchError, match=r"differs from torch by [0-9]") as caught:
        exporter.export("synthetic:bert-tiny", tmp_path, Config())
    assert caught.value.exit_code == 4


def test_fingerprint_depends_on_the_head():
    first, second = (
        exporter.fingerprint("synthetic:bert-tiny", Config(head=head))
        for head in ("encoder", "masked-lm")
    )
    assert first != second


def test_exported_model_is_one_value(tmp_path):
    exported = ExportedModel(tmp_path, "x", "0", "bert", "encoder", 8, (), ("y",))
    assert exported.onnx_path == tmp_path / "model.onnx"
    assert dataclasses.replace(exported, notes=()) == exported


def test_largest_difference_ignores_padding_and_refuses_nan():
    mask = np.asarray([[1, 1, 0]])
    want = np.zeros((1, 3, 2), np.float32)
    got = want.copy()
    got[0, 2] = 9
    assert largest_difference(got, want, mask) == 0
    got[0, 1, 0] = 0.5
    assert largest_difference(got, want, mask) == 0.5
    got[0, 1, 0] = np.nan
    assert largest_difference(got, want, mask) == float("inf")
    assert largest_difference(got[:, :2], want, mask) == float("inf")
