"""The stage that plans: what is asked for, what a model brings, and what it costs each layer."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from helpers import observers, programs

import bertile
from bertile import loader
from bertile.backends.cpu import precision_plan
from bertile.base.errors import BertileError, InputError, UsageError
from bertile.cli.main import main
from bertile.config import Config
from bertile.evaluation import datasets
from bertile.evaluation.sentences import sentences
from bertile.graph.importer import import_onnx
from bertile.graph.order import optimize
from bertile.numerics.precision import LayerPlan
from bertile.onnx.samples import sample
from bertile.quantize.observer import layer_inputs
from bertile.quantize.quantizer import Quantizer, smoothable
from bertile.targets import rows as targets

ROW = targets.resolve("native", threads=1)


@pytest.fixture(scope="module")
def graph(exported):
    return optimize(import_onnx(exported))


@pytest.fixture(scope="module")
def samples(exported, tmp_path_factory):
    path = tmp_path_factory.mktemp("samples") / "inputs.npz"
    np.savez(path, **sample(exported.inputs, 6, 40, 0))
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def observers_built_once():
    with observers.built_once():
        yield


def no_answers(graph, dataset):
    raise AssertionError("nothing is to be compiled")


def planned(graph, **config):
    return Quantizer(graph, ROW, Config(precision="int8", **config)).plan(no_answers)


def test_nothing_is_run_where_ranges_are_per_token(graph, monkeypatch):
    monkeypatch.setattr("bertile.quantize.quantizer.Observer", None)
    assert planned(graph) == {}


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
def test_static_ranges_are_planned_for_every_layer(graph, samples, method):
    plan = planned(graph, calibrate=samples, ranges=method)
    assert list(plan) == [name for name, _ in layer_inputs(graph)]
    for layer_plan in plan.values():
        assert layer_plan.precision == "int8" and layer_plan.static and layer_plan.smooth is None
        assert -10 < layer_plan.low < 0 < layer_plan.high < 10


def test_smoothing_is_planned_where_a_norm_gives_the_input(graph, samples):
    plan = planned(graph, calibrate=samples, smooth=0.5)
    smoothed = [name for name, layer_plan in plan.items() if layer_plan.smooth is not None]
    assert smoothed == smoothable(graph) and len(smoothed) == 4  # of each layer QKV and the wide
    assert all("output" not in name for name in smoothed)
    assert not any(layer_plan.static for layer_plan in plan.values())


def test_static_ranges_are_those_of_the_smoothed_input(graph, samples):
    plain = planned(graph, calibrate=samples, ranges="minmax")
    both = planned(graph, calibrate=samples, ranges="minmax", smooth=0.5)
    for name, layer_plan in both.items():
        if layer_plan.smooth is None:
            assert layer_plan.high == plain[name].high
        else:
            assert plain[name].high * layer_plan.smooth.min() <= layer_plan.high
            assert layer_plan.high <= plain[name].high * layer_plan.smooth.max()
            assert layer_plan.high != pytest.approx(plain[name].high, rel=1e-3)


def test_what_the_model_brings_goes_first(graph, samples):
    name = layer_inputs(graph)[0][0]
    own = LayerPlan("int8", -1.0, 3.0)
    brought = dataclasses.replace(graph, plan={name: own})
    plan = planned(brought, calibrate=samples, ranges="minmax")
    assert plan[name] is own and len(plan) == len(layer_inputs(graph))


def test_report_has_a_row_for_every_layer(graph):
    quantizer = Quantizer(graph, ROW, Config(precision="int8"))
    plan = precision_plan.plan_layers(graph, "int8", ROW).plan
    rows = quantizer.report(plan)["layers"]
    assert {row["layer"] for row in rows} == {name for name, _ in layer_inputs(graph)}
    assert all(30 < row["output dB"] < 60 for row in rows if row["precision"] == "int8")
    assert rows[-1]["precision"] == "fp32" and "one row" in rows[-1]["why"]


def test_report_of_a_plan_without_bytes_is_empty(graph, monkeypatch):
    monkeypatch.setattr("bertile.quantize.quantizer.Observer", None)
    plan = precision_plan.plan_layers(graph, "fp32", ROW).plan
    assert Quantizer(graph, ROW, Config()).report(plan) == {}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, stages):
    path = tmp_path_factory.mktemp("bundle") / "tiny"
    bertile.compile("synthetic:bert-tiny", path, Config(precision="int8", cache_dir=stages))
    return path


def test_inspect_quant_prints_the_worst_layer_first(bundle, capsys):
    assert main(["inspect", str(bundle), "--quant"]) == 0
    lines = capsys.readouterr().out.splitlines()
    layers = loader.read_manifest(bundle)["quantization"]["layers"]
    assert lines[0].split()[:2] == ["layer", "precision"] and len(lines) == 2 + len(layers)
    assert lines[2].startswith(layers[0]["layer"])
    values = [row["output dB"] for row in layers if row["output dB"]]
    assert values == sorted(values)


def test_inspect_quant_of_a_float_bundle_says_so(tmp_path, stages, capsys):
    bertile.compile("synthetic:bert-tiny", tmp_path / "plain", Config(cache_dir=stages))
    assert main(["inspect", str(tmp_path / "plain"), "--quant"]) == 0
    assert capsys.readouterr().out == "no layer is quantized\n"


def test_changed_calibration_file_is_read_again_and_named_without_its_directory(tmp_path):
    """With a model of one layer: what counts is the file."""
    exported = programs.exported_of(programs.MATCHED["a product without a bias"], tmp_path)
    path = str(tmp_path / "inputs.npz")
    cache = str(tmp_path / "cache")
    config = Config(precision="int8", calibrate=path, ranges="minmax", cache_dir=cache)

    def compiled(seed: int) -> str:
        np.savez(path, **sample(exported.inputs[:1], 8, 60, 0, seed))  # nothing reads the mask
        bertile.compile(exported.onnx_path, tmp_path / "out", config)
        return (tmp_path / "out" / "manifest.json").read_text()

    manifests = compiled(1), compiled(2)
    for text in manifests:
        assert '"calibration": "inputs.npz"' in text and path not in text
    first, second = (json.loads(text)["quantization"]["layers"] for text in manifests)
    assert [row["precision"] for row in first] == ["int8"] and first != second


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"calibrate": "x.txt"}, "calibrate has no effect without quantization; add precision"),
        ({"precision": "bf16", "smooth": 0.5}, "smooth has no effect without quantization"),
        ({"precision": "int8", "ranges": "mse"}, "ranges needs samples to calibrate on"),
        ({"precision": "int8", "smooth": 0.5}, "smooth needs samples to calibrate on"),
        ({"precision": "int8", "ranges": "mae"}, "did you mean 'mse'?"),
        ({"precision": "int8", "smooth": 1.5}, "smooth is 1.5; give a number from 0 to 1"),
        ({"precision": "int8", "max_drop": 0.01}, "--max-drop and --eval need each other"),
        ({"precision": "int8", "eval": "x.tsv"}, "--max-drop and --eval need each other"),
    ],
)
def test_choices_that_do_not_fit_together_are_refused(fields, message):
    with pytest.raises(UsageError) as caught:
        Config.from_dict(fields)
    assert message in str(caught.value)


class Answers:
    """Compiles nothing: the more layers are in bytes, the more labels are wrong."""

    def __init__(self, harmless: int) -> None:
        self.harmless, self.plans = harmless, []

    def __call__(self, graph, dataset):
        self.plans.append(graph.plan)
        quantized = sum(layer_plan.precision == "int8" for layer_plan in graph.plan.values())
        logits = np.tile([1.0, 0.0], (len(dataset.texts), 1))
        logits[: 10 * max(0, quantized - self.harmless)] = [0.0, 1.0]
        return logits


@pytest.fixture(scope="module")
def classifier(graph):
    described = dataclasses.replace(
        graph.exported, head="sequence-classification", labels=("good", "bad")
    )
    return dataclasses.replace(graph, exported=described)


def test_layers_are_kept_until_the_drop_is_within_what_is_allowed(classifier, tmp_path):
    (tmp_path / "test.tsv").write_text("a text\tgood\n" * 100)
    config = Config(precision="int8", max_drop=0.1, eval=str(tmp_path / "test.tsv"))
    quantizer, answers = Quantizer(classifier, ROW, config), Answers(harmless=4)
    plan = quantizer.plan(answers)
    report = quantizer.report(precision_plan.plan_layers(
        dataclasses.replace(classifier, plan=plan), "int8", ROW).plan)  # fmt: skip
    kept = [row for row in report["layers"] if row["precision"] in ("bf16", "fp32") and row["why"]]
    noisy = [row for row in kept if "noisiest" in row["why"]]
    assert len(noisy) == 3  # of eight layers in bytes five cost one step of what is allowed
    assert all(layer_plan.precision == "fp32" for layer_plan in answers.plans[0].values())
    assert report["accuracy"]["metric"] == "accuracy" and report["accuracy"]["fp32"] == 1.0
    assert report["accuracy"]["tried"][0]["score"] == pytest.approx(0.6)


def test_file_that_does_not_fit_the_head_is_refused_before_anything_runs(classifier, tmp_path):
    (tmp_path / "x.txt").write_text("One.\nTwo.\nThree.\n")
    config = Config(precision="int8", max_drop=0.1, eval=str(tmp_path / "x.txt"))
    with pytest.raises(InputError, match="is evaluated with labelled texts"):
        Quantizer(classifier, ROW, config).plan(no_answers)


def test_missing_files_are_refused(classifier, tmp_path):
    for fields in ({"calibrate": "no.npz", "ranges": "mse"}, {"max_drop": 0.1, "eval": "no.tsv"}):
        with pytest.raises(BertileError, match="there is no"):
            planned(classifier, **fields)


@pytest.mark.slow
def test_compile_keeps_layers_until_embeddings_are_close_enough(tmp_path, stages):
    """By an empty log: in one of this machine a layer may be slower in bytes, for another why."""
    (tmp_path / "x.txt").write_text("\n".join(sentences(100)))
    no_log = {"shipped_log": False, "log_dir": str(tmp_path / "log"), "cache_dir": stages}
    config = Config(precision="int8", max_drop=0.0004, eval=str(tmp_path / "x.txt"), **no_log)
    bertile.compile("minilm", tmp_path / "kept", config)
    bertile.compile("minilm", tmp_path / "plain", Config(**no_log))
    dataset = datasets.read(tmp_path / "x.txt")
    kept, plain = (datasets.answers(tmp_path / name, dataset) for name in ("kept", "plain"))
    assert 0.9996 <= dataset.score(kept, plain, ()) < 0.99999
    quantization = loader.read_manifest(tmp_path / "kept")["quantization"]
    higher = [row for row in quantization["layers"] if row["why"]]
    assert quantization["accuracy"]["tried"][0]["score"] < 0.9996 and 0 < len(higher) < 24
    assert all("drops by" in row["why"] and row["precision"] != "int8" for row in higher)


def in_four_bits(graph, **config):
    return Quantizer(graph, ROW, Config(precision="int4", **config)).plan(no_answers)


def test_every_layer_of_tokens_is_in_four_bits_of_the_size_asked_for(graph, monkeypatch):
    monkeypatch.setattr("bertile.quantize.quantizer.Observer", None)
    plan = in_four_bits(graph, group_size=64)
    assert {(layer.precision, layer.group, layer.rounded) for layer in plan.values()} == {
        ("int4", 64, None)
    }
    assert set(plan) == {name for name, _ in layer_inputs(graph)}


def test_calibrated_weights_change_the_layers_outputs_less(graph, samples):
    near, made_up = (
        in_four_bits(graph, calibrate=samples, rounding=rounding)
        for rounding in ("nearest", "gptq")
    )
    rows = {}
    for name, plan in (("nearest", near), ("gptq", made_up)):
        quantizer = Quantizer(graph, ROW, Config(precision="int4", calibrate=samples))
        rows[name] = {row["layer"]: row["output dB"] for row in quantizer.report(plan)["layers"]}
    better = [rows["gptq"][name] > rows["nearest"][name] for name in rows["gptq"]]
    assert len(better) == len(made_up) and np.mean(better) > 0.9


def test_layers_that_cost_too_much_in_four_bits_are_tried_in_eight_first(graph):
    assert Quantizer(graph, ROW, Config(precision="int4"))._higher()[0] == "int8"
    assert "int8" not in Quantizer(graph, ROW, Config(precision="int8"))._higher()
