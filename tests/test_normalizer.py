"""ONNX files of other exporters: each form becomes canonical, imports and equals the original."""

import io
import json
import logging
import warnings
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import onnx
import pytest
import torch
import transformers
from onnx import TensorProto, helper, numpy_helper

from bertile import exporter, normalizer, onnx_graph, onnx_reader, probing, synthetic
from bertile.config import Config
from bertile.errors import ModelError, NumericMismatchError, UsageError
from bertile.samples import largest_difference, sample, session

TOLERANCE = 5e-5  # two layers in float32, scaled and summed in another order than the original's
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
AUTO = {
    "encoder": "AutoModel",
    "sequence-classification": "AutoModelForSequenceClassification",
    "masked-lm": "AutoModelForMaskedLM",
}


class Positional(torch.nn.Module):
    """The plain forward of a transformers model, as other exporters trace it."""

    def __init__(self, model, names):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *arrays):
        found = self.model(**dict(zip(self.names, arrays)))
        return tuple(value for value in found.values() if value is not None)


def write(
    path,
    name="bert-tiny",
    head="encoder",
    attention="sdpa",
    dynamo=False,
    opset=14,
    dynamic=True,
    types=True,
    dtype=torch.int64,
    change=lambda model: None,
):
    """Write the model, changed in place, as torch's TorchScript exporter does, and optimum after
    it, or dynamo.
    """
    model = synthetic.build(getattr(transformers, AUTO[head]), synthetic.config(name))
    change(model)
    model.set_attn_implementation(attention)
    names = INPUTS[: 3 if types else 2]
    ids = torch.arange(32).reshape(2, 16) + 5
    mask = (torch.arange(16) < torch.tensor([[16], [9]])).to(torch.int64)
    arrays = tuple(one.to(dtype) for one in (ids, mask, ids % 2)[: len(names)])
    module = Positional(model, names).eval()
    with torch.no_grad():
        count = len(module(*arrays))
    outputs = ["last_hidden_state", "pooler_output"][:count] if head == "encoder" else ["logits"]
    options = {"input_names": list(names), "output_names": outputs, "opset_version": opset}
    if dynamo:
        axes = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("seq", min=1, max=512)}
        shapes = (tuple(dict(axes) for _ in names),) if dynamic else None
        options |= {"dynamo": True, "external_data": False, "dynamic_shapes": shapes}
        options |= {"verbose": False}
    else:
        options |= {"dynamo": False}
        if dynamic:
            axes = {0: "batch_size", 1: "sequence_length"}
            options["dynamic_axes"] = {one: axes for one in (*names, *outputs)}
            for one in ("pooler_output", *(["logits"] if "sequence" in head else [])):
                options["dynamic_axes"][one] = {0: "batch_size"}
    run_quietly(module, arrays, path, options)
    return path


def run_quietly(module, arrays, path, options):
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            with redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")
                torch.onnx.export(module, arrays, str(path), **options)
    finally:
        logging.disable(logging.NOTSET)


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """One TorchScript export, to be copied and damaged."""
    return write(tmp_path_factory.mktemp("plain") / "model.onnx")


def check(path, tmp_path, shapes=((1, 1), (3, 37), (2, 16))):
    """Normalise; compare with the original; import into TVM; return what came out."""
    exported = normalizer.normalize(path, tmp_path / "out", Config())
    before, after = session(path), session(exported.onnx_path)
    given = {one.name: one.type for one in before.get_inputs()}
    for seed, (batch, length) in enumerate(shapes):
        arrays = sample(exported.inputs, batch, length, 1, seed)
        mask = arrays.get("attention_mask", np.ones((batch, length)))
        unread = {one: np.zeros_like(arrays["input_ids"]) for one in given if one not in arrays}
        want = before.run(list(exported.outputs), {**arrays, **unread})
        for one, other in zip(after.run(list(exported.outputs), arrays), want):
            assert largest_difference(one, other, mask) < TOLERANCE
    model = onnx.load(exported.onnx_path)
    frontend = pytest.importorskip("tvm.relax.frontend.onnx")
    frontend.from_onnx(model, keep_params_in_input=True)
    return exported, model


def operators(model):
    return [node.op_type for node in model.graph.node]


def assert_canonical(model, layers=2):
    """The operators that the exporter of Bertile writes, and no others around the attention."""
    found = operators(model)
    assert found.count("Softmax") == layers
    assert found.count("LayerNormalization") >= 2 * layers + 1
    assert found.count("Gelu") >= layers
    unwanted = {"Where", "IsNaN", "Erf", "Expand", "GatherND", "Range", "Gemm", "Identity"}
    assert not unwanted & set(found)
    assert found.count("Reshape") == 4 * layers and found.count("Transpose") <= 4 * layers + 2
    masks = {
        name
        for node in model.graph.node
        if node.op_type == "Add"
        for name in node.input
        if name.startswith("bertile.mul.")
    }
    assert masks, "no mask is added to the scores"
    assert {one.domain for one in model.opset_import} == {""}


@pytest.mark.parametrize("opset", [13, 17])
@pytest.mark.parametrize("dynamic", [True, False])
def test_normalize_torchscript_with_eager_attention(tmp_path, opset, dynamic):
    path = write(tmp_path / "m.onnx", attention="eager", opset=opset, dynamic=dynamic)
    shapes = ((1, 1), (3, 37), (1, 512)) if dynamic else ((2, 16),)
    exported, model = check(path, tmp_path, shapes)
    assert_canonical(model)
    assert (exported.batch, exported.length) == ((None, None) if dynamic else (2, 16))
    assert exported.max_length == (512 if dynamic else 16)
    axes = [
        one.dim_param or one.dim_value for one in model.graph.input[0].type.tensor_type.shape.dim
    ]
    assert axes == (["batch", "length"] if dynamic else [2, 16])


@pytest.mark.parametrize("opset", [14, 17])
@pytest.mark.parametrize("dynamic", [True, False])
def test_normalize_torchscript_with_sdpa(tmp_path, opset, dynamic):
    path = write(tmp_path / "m.onnx", opset=opset, dynamic=dynamic)
    _, model = check(path, tmp_path, ((1, 1), (3, 37)) if dynamic else ((2, 16),))
    assert_canonical(model)


@pytest.mark.parametrize(
    ("attention", "opset", "dynamic"),
    [("sdpa", 20, True), ("eager", 18, False), ("sdpa", 23, True)],
)
def test_normalize_dynamo(tmp_path, attention, opset, dynamic):
    path = write(tmp_path / "m.onnx", "bert-tiny", "encoder", attention, True, opset, dynamic)
    _, model = check(path, tmp_path, ((1, 1), (3, 37)) if dynamic else ((2, 16),))
    assert_canonical(model)
    assert "Attention" not in operators(model)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["roberta", "distilbert", "electra", "albert", "mpnet"])
def test_normalize_dynamo_of_each_family(tmp_path, family):
    types = family in ("electra", "albert")
    path = write(tmp_path / "m.onnx", f"{family}-tiny", dynamo=True, opset=20, types=types)
    _, model = check(path, tmp_path)
    assert_canonical(model)


@pytest.mark.parametrize("family", ["roberta", "distilbert", "electra", "albert", "mpnet"])
def test_normalize_torchscript_of_each_family(tmp_path, family):
    types = family in ("electra", "albert")
    path = write(tmp_path / "m.onnx", f"{family}-tiny", types=types)
    exported, model = check(path, tmp_path, ((1, 1), (3, 37), (1, 512)))
    assert_canonical(model)
    assert exported.max_length == 512
    assert [one.below for one in exported.inputs] == [1000, 2, 2][: 3 if types else 2]
    assert operators(model).count("CumSum") == (family in ("roberta", "mpnet"))


def test_normalize_folds_the_token_type_that_is_no_input(tmp_path):
    exported, model = check(write(tmp_path / "m.onnx", types=False), tmp_path)
    assert_canonical(model)
    assert [one.name for one in exported.inputs] == ["input_ids", "attention_mask"]
    tables = [node for node in model.graph.node if node.op_type == "Gather"]
    assert len(tables) == 3  # words, positions with the type's row added, the pooler's token


def test_normalize_keeps_int32_inputs(tmp_path):
    exported, model = check(write(tmp_path / "m.onnx", dtype=torch.int32), tmp_path)
    assert_canonical(model)
    assert {one.dtype for one in exported.inputs} == {"int32"}


@pytest.mark.parametrize("head", ["sequence-classification", "masked-lm"])
def test_normalize_tells_the_head_from_the_outputs(tmp_path, head):
    exported, model = check(write(tmp_path / "m.onnx", head=head), tmp_path)
    assert_canonical(model)
    assert (exported.head, exported.family) == (head, "unknown")


def test_normalize_equals_what_the_exporter_writes(tmp_path, plain):
    """The same model through both doors: the same operators, and the same numbers."""
    ours = exporter.export("synthetic:bert-tiny", tmp_path / "ours", Config())
    theirs = exporter.export(plain, tmp_path / "theirs", Config())
    first, second = (onnx.load(one.onnx_path) for one in (ours, theirs))
    assert sorted(operators(first)) == sorted(operators(second))
    arrays = sample(ours.inputs, 3, 20, 0)
    for one, other in zip(*(session(e.onnx_path).run(None, arrays) for e in (ours, theirs))):
        assert largest_difference(one, other, arrays["attention_mask"]) < TOLERANCE


def test_normalize_reads_what_lies_beside_the_file(tmp_path):
    path = write(tmp_path / "m.onnx", head="sequence-classification")
    config = {"model_type": "bert", "id2label": {"1": "good", "0": "bad"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_text("{}")
    exported = normalizer.normalize(path, tmp_path / "out", Config())
    assert (exported.family, exported.labels) == ("bert", ("bad", "good"))
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_normalize_reads_external_weights(tmp_path, plain):
    path = tmp_path / "m.onnx"
    model = onnx.load(plain)
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    exported, _ = check(path, tmp_path)
    before = exporter.fingerprint(path, Config())
    assert before == exported.sha256
    weights = tmp_path / "weights.bin"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
    assert exporter.fingerprint(path, Config()) != before
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"in 'weights\.bin' is cut short|which cannot be read"):
        normalizer.normalize(path, tmp_path / "out", Config())
    weights.unlink()
    with pytest.raises(ModelError, match=r"keeps its weights in 'weights\.bin' beside it"):
        normalizer.normalize(path, tmp_path / "out", Config())


def test_normalize_puts_large_weights_beside_the_model(tmp_path, plain, monkeypatch):
    monkeypatch.setattr(onnx_graph, "EXTERNAL_DATA_BYTES", 0)
    monkeypatch.setattr(probing, "EXTERNAL_DATA_BYTES", 0)
    check(plain, tmp_path)
    data = tmp_path / "out" / "model.onnx.data"
    size = data.stat().st_size
    check(plain, tmp_path)
    assert data.stat().st_size == size > 1_000_000


@pytest.mark.parametrize("family", ["roberta", "mpnet"])
def test_normalize_static_axes_of_other_positions(tmp_path, family):
    path = write(tmp_path / "m.onnx", f"{family}-tiny", types=False, dynamic=False)
    exported, model = check(path, tmp_path, ((2, 16),))
    assert_canonical(model)
    assert (exported.batch, exported.length, exported.max_length) == (2, 16, 16)


# Masks of other kinds, in a model of one attention


class OneAttention(torch.nn.Module):
    """One self-attention whose mask is applied by `masked`(scores, attention_mask)."""

    def __init__(self, masked):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.masked = torch.nn.Embedding(50, 16), masked
        self.query, self.key = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

    def forward(self, input_ids, attention_mask):
        hidden = self.words(input_ids)
        batch, length = input_ids.shape
        query, key = (
            one(hidden).view(batch, length, 2, 8).transpose(1, 2) for one in (self.query, self.key)
        )
        scores = torch.matmul(query / 8**0.5, key.transpose(2, 3))
        weights = torch.softmax(self.masked(scores, attention_mask), dim=-1)
        value = hidden.view(batch, length, 2, 8).transpose(1, 2)
        return torch.matmul(weights, value).transpose(1, 2).reshape(batch, length, 16)


def write_attention(path, masked):
    arrays = (torch.ones(2, 6, dtype=torch.int64),) * 2
    axes = {0: "b", 1: "s"}
    names = ["input_ids", "attention_mask"]
    options = {"dynamo": False, "opset_version": 14, "input_names": names}
    options |= {
        "output_names": ["hidden"],
        "dynamic_axes": {one: axes for one in (*names, "hidden")},
    }
    run_quietly(OneAttention(masked), arrays, path, options)
    return path


def by_fill(scores, mask):  # DistilBERT's old form
    padded = (mask == 0)[:, None, None, :].expand(scores.shape)
    return scores.masked_fill(padded, float("-inf"))


def by_lowest(scores, mask):  # BERT's old form
    lowest = torch.finfo(torch.float32).min
    return scores + (1.0 - mask[:, None, None, :].float()) * lowest


def by_selection(scores, mask):
    return torch.where(mask[:, None, None, :] > 0, scores, torch.tensor(-1e9))


@pytest.mark.parametrize("masked", [by_fill, by_lowest, by_selection])
def test_normalize_replaces_every_mask_by_key(tmp_path, masked):
    exported, model = check(write_attention(tmp_path / "m.onnx", masked), tmp_path)
    found = operators(model)
    assert not {"Where", "Expand", "ConstantOfShape"} & set(found)
    assert found.count("Sub") == 1 and exported.head == "unknown"
    assert not any("is kept as it is" in note for note in exported.notes)
    assert [one.below for one in exported.inputs] == [50, 2]


def prefixed(scores, mask):
    """Half of the real tokens are seen by all: no table of places says that."""
    places, half = torch.arange(mask.shape[1]), mask.sum(1)[:, None, None, None] // 2
    seen = (places[None, :] <= places[:, None]) | (places < half)
    return torch.where(seen & (mask[:, None, None, :] > 0), scores, torch.tensor(-1e9))


def blind(scores, mask):
    """The first tokens see nothing: a softmax of equal numbers, whatever these are."""
    places = torch.arange(mask.shape[1])
    return torch.where(places[None, :] < places[:, None] - 2, scores, torch.tensor(-1e9))


@pytest.mark.parametrize("masked", [prefixed, blind])
def test_normalize_keeps_a_mask_that_places_do_not_decide(tmp_path, masked):
    path = write_attention(tmp_path / "m.onnx", masked)
    exported = normalizer.normalize(path, tmp_path / "out", Config())
    assert "is kept as it is" in exported.notes[0]
    assert "Where" in operators(onnx.load(exported.onnx_path))


def test_normalize_drops_a_mask_of_zeros(tmp_path):
    path = write_attention(tmp_path / "m.onnx", lambda scores, mask: scores + 0.0 * scores[..., :1])
    exported = normalizer.normalize(path, tmp_path / "out", Config())
    assert [one.name for one in exported.inputs] == ["input_ids"]


# Bad files


def edited(plain, path, edit):
    model = onnx.load(plain)
    edit(model.graph)
    onnx.save(model, path)
    return path


def refused(path, tmp_path, error=ModelError):
    with pytest.raises(error) as caught:
        normalizer.normalize(path, tmp_path / "out", Config())
    assert not (tmp_path / "out" / "model.onnx").exists() and "\n" not in str(caught.value)
    return str(caught.value)


def test_normalize_refuses_what_is_no_onnx_file(tmp_path, plain):
    path = tmp_path / "m.onnx"
    assert "there is no file" in refused(path, tmp_path)
    for content in (b"", b"plain text " * 50, plain.read_bytes()[:5000], plain.read_bytes()[:-99]):
        path.write_bytes(content)
        assert "is not an ONNX file, or it is truncated" in refused(path, tmp_path)


def test_normalize_names_inputs_that_are_wrong(tmp_path, plain):
    def rename(old, new):
        def edit(graph):
            for one in graph.input:
                one.name = new if one.name == old else one.name
            for node in graph.node:
                node.input[:] = [new if name == old else name for name in node.input]

        return edited(plain, tmp_path / "m.onnx", edit)

    message = refused(rename("input_ids", "ids"), tmp_path)
    assert "has no input 'input_ids' (it has ids, attention_mask, token_type_ids)" in message
    message = refused(rename("token_type_ids", "segment_ids"), tmp_path)
    assert "has the input 'segment_ids', which is unsupported" in message

    def to_float(graph):
        graph.input[1].type.tensor_type.elem_type = TensorProto.FLOAT

    path = edited(plain, tmp_path / "m.onnx", to_float)
    assert "input 'attention_mask'" in refused(path, tmp_path)


@pytest.mark.parametrize(
    ("op", "domain", "message"),
    [
        ("FusedSecret", "", "operator FusedSecret (node 'the-node') cannot be imported"),
        ("BiasGelu", "com.microsoft", "operator com.microsoft.BiasGelu (node 'the-node')"),
    ],
)
def test_normalize_names_an_operator_that_cannot_be_imported(tmp_path, plain, op, domain, message):
    def edit(graph):
        node = helper.make_node(op, [graph.node[-1].input[0]], ["odd"], "the-node", domain=domain)
        graph.node.insert(len(graph.node) - 1, node)
        graph.node[-1].input[0] = "odd"

    assert message in refused(edited(plain, tmp_path / "m.onnx", edit), tmp_path)


def test_normalize_refuses_control_flow_by_name(tmp_path, plain):
    def edit(graph):
        last = graph.node[-1].output[0]
        graph.node[-1].output[0] = "before"
        value = helper.make_tensor_value_info("inside", TensorProto.FLOAT, None)
        inner = helper.make_node("Identity", ["before"], ["inside"])
        body = helper.make_graph([inner], "body", [], [value])
        graph.initializer.append(numpy_helper.from_array(np.asarray(True), "yes"))
        graph.node.append(
            helper.make_node("If", ["yes"], [last], "branch", then_branch=body, else_branch=body)
        )

    message = refused(edited(plain, tmp_path / "m.onnx", edit), tmp_path)
    assert "operator If (node 'branch') cannot be imported" in message


def test_normalize_refuses_another_head_than_the_outputs_have(tmp_path, plain):
    with pytest.raises(UsageError, match="are those of the head 'encoder', not 'masked-lm'"):
        normalizer.normalize(plain, tmp_path, Config(head="masked-lm"))


def test_normalize_fails_when_the_result_differs(tmp_path, plain, monkeypatch):
    monkeypatch.setattr(normalizer, "largest_difference", lambda *_: 0.5)
    assert "differs from the original by 0.5" in refused(plain, tmp_path, NumericMismatchError)


def test_read_brings_an_old_opset_up_to_date(tmp_path):
    path = write(tmp_path / "m.onnx", attention="eager", opset=12)
    _, opset = onnx_reader.read(path)
    assert opset == 17
    _, model = check(path, tmp_path)
    assert_canonical(model)


def test_normalize_prints_nothing(tmp_path, plain, capfd):
    normalizer.normalize(plain, tmp_path, Config())
    assert capfd.readouterr() == ("", "")


def test_names_made_are_none_that_the_file_has():
    """A file that Bertile wrote, and somebody has quantized, comes back with names of ours."""
    first = onnx_graph.OnnxGraph(onnx.ModelProto())
    taken = first.add("Mul", [first.number(1.0), first.number(2.0)])
    first.outputs = [taken]
    second = onnx_graph.OnnxGraph(first.to_model(20))
    made = {second.fresh("mul"), second.fresh("constant"), second.fresh("mul")}
    assert len(made) == 3
    assert not made & {taken, *first.nodes[0].input}
