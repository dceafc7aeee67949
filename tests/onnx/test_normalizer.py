"""ONNX files of other exporters: each form becomes canonical, imports and equals the original."""

import json

import numpy as np
import onnx
import pytest
import torch
from helpers import family_models, tiny_encoder
from helpers.family_models import has_types
from helpers.foreign_forms import (
    TOLERANCE,
    operators,
    prefixed,
    write,
    write_attention,
)
from onnx import TensorProto, helper

from bertile.base.errors import ModelError, NumericMismatchError, UsageError
from bertile.config import Config
from bertile.export import exporter
from bertile.families.family import AFTER_PADDING, BY_ANGLE, BY_DISTANCE
from bertile.families.table import FAMILIES, named
from bertile.onnx import graph as onnx_graph
from bertile.onnx import normalizer, places, probing, reader
from bertile.onnx.samples import largest_difference, sample, session


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """One TorchScript export of one layer, to be copied and damaged."""
    return write(tmp_path_factory.mktemp("plain") / "model.onnx", layers=1)


def check(path, tmp_path, shapes=((1, 1), (3, 37), (2, 16))):
    """Normalise; compare with the original; import into TVM; return what came out."""
    exported = normalizer.normalize(path, tmp_path / "out", Config())
    before, after = session(path), session(exported.onnx_path)
    types = {argument.name: argument.type for argument in before.get_inputs()}
    for seed, (batch, length) in enumerate(shapes):
        arrays = sample(exported.inputs, batch, length, 1, seed)
        mask = arrays.get("attention_mask", np.ones((batch, length)))
        unread = {name: np.zeros_like(arrays["input_ids"]) for name in types if name not in arrays}
        want = before.run(list(exported.outputs), {**arrays, **unread})
        for got, expected in zip(after.run(list(exported.outputs), arrays), want):
            assert largest_difference(got, expected, mask) < TOLERANCE
    model = onnx.load(exported.onnx_path)
    frontend = pytest.importorskip("tvm.relax.frontend.onnx")
    frontend.from_onnx(model, keep_params_in_input=True)
    return exported, model


def assert_canonical(model, layers=2):
    """The operators that the exporter of Bertile writes, and no others around the attention."""
    names = operators(model)
    assert names.count("Softmax") == layers
    assert names.count("LayerNormalization") >= 2 * layers + 1
    assert names.count("Gelu") + names.count("Sigmoid") >= layers
    unwanted = {"Where", "IsNaN", "Erf", "Expand", "GatherND", "Range", "Gemm", "Identity"}
    assert not unwanted & set(names)
    assert names.count("Reshape") == 4 * layers and names.count("Transpose") <= 4 * layers + 2
    masks = {
        name
        for node in model.graph.node
        if node.op_type == "Add"
        for name in node.input
        if name.startswith("bertile.mul.")
    }
    assert masks, "no mask is added to the scores"
    assert {imported.domain for imported in model.opset_import} == {""}


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("opset", "dynamic"), [(13, True), (17, False), slow(13, False), slow(17, True)]
)
def test_normalize_torchscript_with_eager_attention(tmp_path, opset, dynamic):
    path = write(tmp_path / "m.onnx", attention="eager", opset=opset, dynamic=dynamic)
    shapes = ((1, 1), (3, 37), (1, 512)) if dynamic else ((2, 16),)
    exported, model = check(path, tmp_path, shapes)
    assert_canonical(model)
    assert (exported.batch, exported.length) == ((None, None) if dynamic else (2, 16))
    assert exported.max_length == (512 if dynamic else 16)
    axes = [
        axis.dim_param or axis.dim_value for axis in model.graph.input[0].type.tensor_type.shape.dim
    ]
    assert axes == (["batch", "length"] if dynamic else [2, 16])


@pytest.mark.parametrize(
    ("opset", "dynamic"), [(14, False), (17, True), slow(14, True), slow(17, False)]
)
def test_normalize_torchscript_with_sdpa(tmp_path, opset, dynamic):
    path = write(tmp_path / "m.onnx", opset=opset, dynamic=dynamic)
    _, model = check(path, tmp_path, ((1, 1), (3, 37)) if dynamic else ((2, 16),))
    assert_canonical(model)


@pytest.mark.parametrize(
    ("attention", "opset", "dynamic", "layers"),
    [("sdpa", 20, True, 2), ("eager", 18, False, 1), ("sdpa", 23, True, 1)],
)
def test_normalize_dynamo(tmp_path, attention, opset, dynamic, layers):
    options = dict(attention=attention, opset=opset, dynamic=dynamic, layers=layers)
    path = write(tmp_path / "m.onnx", dynamo=True, **options)
    _, model = check(path, tmp_path, ((1, 1), (3, 37)) if dynamic else ((2, 16),))
    assert_canonical(model, layers)
    assert "Attention" not in operators(model)


# Files of DeBERTa's own code compute shapes and indices in ways that are not followed.
OTHERS = [row for row in map(named, family_models.OTHERS) if row.positions != BY_DISTANCE]


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHERS, ids=lambda family: family.name)
def test_normalize_dynamo_of_each_family(tmp_path, family):
    types = has_types(family)
    path = write(tmp_path / "m.onnx", f"{family.name}-tiny", dynamo=True, opset=20, types=types)
    _, model = check(path, tmp_path)
    assert_canonical(model)


@pytest.mark.parametrize("family", OTHERS, ids=lambda family: family.name)
def test_normalize_torchscript_of_each_family(tmp_path, family):
    types = has_types(family)
    path = write(tmp_path / "m.onnx", f"{family.name}-tiny", types=types, layers=1)
    exported, model = check(path, tmp_path, ((1, 1), (3, 37), (1, 512)))
    assert_canonical(model, layers=1)
    # without a table of positions, and no config beside the file, it is as long as angles are made
    assert exported.max_length == (places.POSITIONS if family.positions == BY_ANGLE else 512)
    assert [spec.below for spec in exported.inputs] == [1000, 2, 2][: 3 if types else 2]
    assert operators(model).count("CumSum") == (family.positions == AFTER_PADDING)


def test_normalize_folds_the_token_type_that_is_no_input(tmp_path):
    exported, model = check(write(tmp_path / "m.onnx", types=False, layers=1), tmp_path)
    assert_canonical(model, layers=1)
    assert [spec.name for spec in exported.inputs] == ["input_ids", "attention_mask"]
    tables = [node for node in model.graph.node if node.op_type == "Gather"]
    assert len(tables) == 3  # words, positions with the type's row added, the pooler's token


def test_normalize_keeps_int32_inputs(tmp_path):
    exported, model = check(write(tmp_path / "m.onnx", dtype=torch.int32, layers=1), tmp_path)
    assert_canonical(model, layers=1)
    assert {spec.dtype for spec in exported.inputs} == {"int32"}


def test_normalize_tells_the_head_and_reads_what_lies_beside_the_file(tmp_path):
    path = write(tmp_path / "m.onnx", head="sequence-classification", layers=1)
    exported, model = check(path, tmp_path)
    assert_canonical(model, layers=1)
    assert (exported.head, exported.family) == ("sequence-classification", "unknown")
    config = {"model_type": "bert", "id2label": {"1": "good", "0": "bad"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tiny_encoder.tokenizer(tmp_path / "tokenizer.json")
    exported = normalizer.normalize(path, tmp_path / "out", Config())
    assert (exported.family, exported.labels) == ("bert", ("bad", "good"))
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert (exported.text.scores, exported.text.activation) == ("softmax", "none")


def test_normalize_tells_a_masked_lm_from_its_outputs(tmp_path):
    exported, model = check(write(tmp_path / "m.onnx", head="masked-lm", layers=1), tmp_path)
    assert_canonical(model, layers=1)
    assert (exported.head, exported.family) == ("masked-lm", "unknown")


def test_normalize_equals_what_the_exporter_writes(tmp_path, stages):
    """The same model through both doors: the same operators, and the same numbers."""
    ours = family_models.exported("bert-tiny", "encoder", stages)
    theirs = exporter.export(write(tmp_path / "m.onnx"), tmp_path / "theirs", Config())
    first, second = (onnx.load(exported.onnx_path) for exported in (ours, theirs))
    assert sorted(operators(first)) == sorted(operators(second))
    arrays = sample(ours.inputs, 3, 20, 0)
    for got, expected in zip(*(session(e.onnx_path).run(None, arrays) for e in (ours, theirs))):
        assert largest_difference(got, expected, arrays["attention_mask"]) < TOLERANCE


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


OTHER_POSITIONS = [family.name for family in FAMILIES if family.positions == AFTER_PADDING]


@pytest.mark.parametrize("family", [OTHER_POSITIONS[0], *map(slow, OTHER_POSITIONS[1:])])
def test_normalize_static_axes_of_other_positions(tmp_path, family):
    path = write(tmp_path / "m.onnx", f"{family}-tiny", types=False, dynamic=False, layers=1)
    exported, model = check(path, tmp_path, ((2, 16),))
    assert_canonical(model, layers=1)
    assert (exported.batch, exported.length, exported.max_length) == (2, 16, 16)


# Masks of other kinds, in a model of one attention


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
    names = operators(model)
    assert not {"Where", "Expand", "ConstantOfShape"} & set(names)
    assert names.count("Sub") == 1 and exported.head == "unknown"
    assert not any("is kept as it is" in note for note in exported.notes)
    assert [spec.below for spec in exported.inputs] == [50, 2]


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
    assert [spec.name for spec in exported.inputs] == ["input_ids"]


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
            for value in graph.input:
                value.name = new if value.name == old else value.name
            for node in graph.node:
                node.input[:] = [new if name == old else name for name in node.input]

        return edited(plain, tmp_path / "m.onnx", edit)

    message = refused(rename("input_ids", "pixels"), tmp_path)
    assert "has the input 'pixels', which is unsupported" in message
    assert "--rename pixels=input_ids" in message

    def to_text(graph):
        graph.input[1].type.tensor_type.elem_type = TensorProto.STRING

    path = edited(plain, tmp_path / "m.onnx", to_text)
    assert "input 'attention_mask'" in refused(path, tmp_path)


@pytest.mark.parametrize(
    ("op", "domain", "message"),
    [
        ("FusedSecret", "", "operator FusedSecret (node 'the-node') cannot be imported"),
        ("Sampling", "com.microsoft", "operator com.microsoft.Sampling (node 'the-node')"),
    ],
)
def test_normalize_names_an_operator_that_cannot_be_imported(tmp_path, plain, op, domain, message):
    def edit(graph):
        node = helper.make_node(op, [graph.node[-1].input[0]], ["odd"], "the-node", domain=domain)
        graph.node.insert(len(graph.node) - 1, node)
        graph.node[-1].input[0] = "odd"

    assert message in refused(edited(plain, tmp_path / "m.onnx", edit), tmp_path)


def test_normalize_refuses_by_name_a_branch_that_values_decide(tmp_path, plain):
    def edit(graph):
        last = graph.node[-1].output[0]
        graph.node[-1].output[0] = "before"
        value = helper.make_tensor_value_info("inside", TensorProto.FLOAT, None)
        inner = helper.make_node("Identity", ["before"], ["inside"])
        body = helper.make_graph([inner], "body", [], [value])
        graph.node.extend(
            [
                helper.make_node("ReduceMax", ["input_ids"], ["most"], keepdims=0),
                helper.make_node("Cast", ["most"], ["any"], to=TensorProto.BOOL),
                helper.make_node(
                    "If", ["any"], [last], "branch", then_branch=body, else_branch=body
                ),
            ]
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
    path = write(tmp_path / "m.onnx", attention="eager", opset=12, layers=1)
    _, opset = reader.read(path)
    assert opset == 17
    _, model = check(path, tmp_path)
    assert_canonical(model, layers=1)


def test_normalize_prints_nothing(tmp_path, capfd):
    path = write_attention(tmp_path / "m.onnx", by_lowest)
    normalizer.normalize(path, tmp_path / "out", Config())
    assert capfd.readouterr() == ("", "")


def test_names_made_are_none_that_the_file_has():
    """A file that Bertile wrote, and somebody has quantized, comes back with names of ours."""
    first = onnx_graph.OnnxGraph(onnx.ModelProto())
    taken = first.add("Mul", [first.number(1.0), first.number(2.0)])
    first.outputs = [taken]
    second = onnx_graph.OnnxGraph(first.to_model(20))
    names = {second.fresh("mul"), second.fresh("constant"), second.fresh("mul")}
    assert len(names) == 3
    assert not names & {taken, *first.nodes[0].input}
