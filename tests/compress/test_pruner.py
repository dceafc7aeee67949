"""`bertile prune`: a directory that compile takes, or one sentence and nothing at all."""

from __future__ import annotations

import json
import re

import pytest
from transformers import PreTrainedModel

import bertile
from bertile import loader
from bertile.base import quiet
from bertile.cli import main
from bertile.compress import pruner
from bertile.config import Config
from bertile.export import checkpoints, files
from bertile.numerics.zeros import analyse

TINY = "synthetic:bert-tiny:question-answering"
KINDS = ("dense", "attention")


def call(capsys, *arguments):
    code = main.main(["prune", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def layer_weights(model):
    """w (inputs, outputs) of every linear layer of a BERT's encoder."""
    return {
        name: module.weight.detach().numpy().T
        for name, module in model.base_model.encoder.named_modules()
        if hasattr(module, "in_features")
    }


def test_directory_keeps_all_but_the_weights(tmp_path, capsys):
    assert call(capsys, "minilm", "-o", tmp_path / "out", "--sparsity", 0.8)[0] == 0
    origin = files.find_directory("minilm")
    for name in ("tokenizer.json", "vocab.txt", "modules.json", "1_Pooling/config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (origin / name).read_bytes()
    pruned, source = checkpoints.load(tmp_path / "out"), checkpoints.load("minilm")
    assert (pruned.head, pruned.chain) == (source.head, source.chain)
    for name, w in layer_weights(pruned.model).items():
        assert analyse(w).pattern == "4x1", name
        assert analyse(w).zeros == pytest.approx(0.8, abs=1e-4)
        assert ((w == 0) | (w == layer_weights(source.model)[name])).all()


def test_weights_in_a_directory_of_their_own_stay_there(tmp_path):
    """The older layout of sentence-transformers."""
    source = tmp_path / "source"
    with quiet.quiet():
        checkpoints.load("synthetic:bert-tiny").model.save_pretrained(source / "0_Transformer")
    modules = [{"type": "sentence_transformers.models.Transformer", "path": "0_Transformer"}]
    (source / "modules.json").write_text(json.dumps(modules))
    (source / "0_Transformer" / "vocab.txt").write_text("[PAD]\n")
    pruner.prune(str(source), tmp_path / "out", 0.5, "4x1")
    assert (tmp_path / "out" / "0_Transformer" / "vocab.txt").exists()
    shares = [
        analyse(w).zeros for w in layer_weights(checkpoints.load(tmp_path / "out").model).values()
    ]
    assert shares == [0.5] * 12
    before = files.fingerprint(tmp_path / "out")
    pruner.prune(str(source), tmp_path / "out", 0.6, "4x1")
    assert files.fingerprint(tmp_path / "out") != before, "the weights count, wherever"


def test_table_says_what_is_zero_and_what_that_costs(tmp_path, capsys):
    code, out, _ = call(capsys, TINY, "-o", tmp_path / "out", "--pattern", "16x1")
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["layers", "count", "inputs", "outputs", "zeros", "%", "pattern"]
    assert rows[6] == ["encoder.layer.intermediate.dense", "2", "128", "512", "89.99", "16x1"]
    assert "until the model is retrained" in out
    assert checkpoints.load(tmp_path / "out").head == "question-answering"


def test_json_is_what_lies_in_the_directory(tmp_path, capsys):
    code, out, _ = call(capsys, TINY, "-o", tmp_path / "out", "--pattern", "2:4", "--json")
    report = json.loads(out)
    assert code == 0 and report.pop("output") == str(tmp_path / "out")
    assert report == json.loads((tmp_path / "out" / "pruned.json").read_text())
    assert (report["sparsity"], report["pattern"], len(report["layers"])) == (0.5, "2:4", 12)
    assert all(row["zeros"] == 0.5 for row in report["layers"])


@pytest.mark.slow
def test_compiled_model_is_smaller_by_what_was_pruned(tmp_path, stages):
    """Half of the heads and half of the neurons; compiling checks the result against ONNX Runtime
    on the whole model.
    """
    pruner.prune(TINY, tmp_path / "heads", 0.5, "heads")
    pruner.prune(str(tmp_path / "heads"), tmp_path / "both", 0.5, "neurons")
    config = Config(precision="int8", cache_dir=stages)
    bertile.compile(tmp_path / "both", tmp_path / "out", config)
    manifest = loader.read_manifest(tmp_path / "out")
    names = (kernel["name"] for kernel in manifest["kernels"])
    sizes = {re.match(r"[a-z]+_\d+_\d+", name)[0] for name in names if name.startswith(KINDS)}
    heads = {"dense_128_192", "attention_1_64", "dense_64_128"}
    assert sizes - {"dense_128_2"} == {*heads, "dense_128_256", "dense_256_128"}
    (note,) = (note for note in manifest["notes"] if "have no effect and were removed" in note)
    assert "heads" in note and "neurons" in note


MISTAKES = {
    "pattern": (2, "did you mean '16x1'?", [TINY, "--pattern", "16x"]),
    "sparsity": (2, "between 0 and 1", [TINY, "--sparsity", "90"]),
    "no number": (2, "--sparsity", [TINY, "--sparsity", "most"]),
    "model": (2, "did you mean 'bert-tiny'?", ["synthetic:bert-tny"]),
    "onnx": (2, "needs a Hugging Face directory", ["model.onnx"]),
    "flag": (2, "did you mean '--sparsity'?", [TINY, "--sparsty", "0.9"]),
    "no directory": (1, "there is no directory", ["./nothing"]),
}


@pytest.mark.parametrize(("code", "message", "arguments"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_line_and_nothing_is_written(tmp_path, capsys, code, message, arguments):
    status, out, err = call(capsys, *arguments, "-q", "-o", tmp_path / "out")
    assert (status, out) == (code, "")
    assert message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_model_without_weights_is_refused(tmp_path, capsys):
    checkpoints.load(TINY).model.config.save_pretrained(tmp_path / "bare")
    code, _, err = call(capsys, tmp_path / "bare", "-q", "-o", tmp_path / "out")
    assert code == 1 and "cannot be loaded" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_older_result_is_replaced_and_anything_else_left_alone(tmp_path, capsys):
    for share in (0.5, 0.9):
        assert call(capsys, TINY, "-o", tmp_path / "out", "--sparsity", share)[0] == 0
        assert json.loads((tmp_path / "out" / "pruned.json").read_text())["sparsity"] == share
    (tmp_path / "out" / "pruned.json").unlink()
    code, _, err = call(capsys, TINY, "-q", "-o", tmp_path / "out")
    assert code == 2 and "was not made by Bertile" in err
    assert (tmp_path / "out" / "config.json").exists()


def test_stop_leaves_nothing_half_written(tmp_path, capsys, monkeypatch):
    whole = PreTrainedModel.save_pretrained

    def stopped(self, place):
        whole(self, place)
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", stopped)
    code, out, err = call(capsys, TINY, "-q", "-o", tmp_path / "deep" / "out")
    assert (code, out, err) == (130, "", "bertile: stopped\n")
    assert not list(tmp_path.iterdir())
