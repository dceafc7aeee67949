"""The whole program: every family and head against ONNX Runtime, real weights against torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.family_models import NAMES

import bertile
from bertile import driver, loader
from bertile.base.errors import BertileError, NumericMismatchError, UsageError
from bertile.base.progress import Progress
from bertile.config import HEADS, Config
from bertile.export import cached
from bertile.onnx.samples import largest_difference, sample, session

# every head once, and every family in families/test_directories; the other pairs take minutes
PAIRS = [
    pytest.param(family, head, marks=() if family == "bert" else pytest.mark.slow)
    for family in NAMES
    for head in HEADS
    if family == "bert" or head != "encoder"
]
SHAPES = ((1, 1), (1, 511), (7, 33))
TOLERANCE = 2e-5  # float32 sums in another order, relative to the largest value of the output


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("stages"))


@pytest.fixture
def compiled(tmp_path, cache):
    def compile_model(model: str, **config) -> loader.Model:
        bertile.compile(model, tmp_path / "bundle", Config(cache_dir=cache, **config))
        return bertile.load(tmp_path / "bundle")

    return compile_model


def assert_equals_onnx(model: loader.Model, name: str, cache: str, shapes=SHAPES) -> None:
    exported = cached.export_cached(name, Config(cache_dir=cache))
    peer = session(exported.onnx_path)
    for batch, length in shapes:
        arrays = sample(exported.inputs, batch, length, padding_id=1, seed=length)
        got, want = model(**arrays), peer.run(None, arrays)
        for output, reference in zip(exported.outputs, want):
            difference = largest_difference(got[output], reference, arrays["attention_mask"])
            assert difference <= TOLERANCE * max(1, np.abs(reference).max()), (batch, length)


@pytest.mark.parametrize(("family", "head"), PAIRS)
def test_every_family_and_head_equals_onnxruntime(family, head, compiled, cache):
    name = f"synthetic:{family}-tiny:{head}"
    model = compiled(name)
    assert_equals_onnx(model, name, cache)
    kinds = {kernel["operation"] for kernel in model.manifest["kernels"]}
    assert {"dense", "attention", "layer_norm", "embedding"} <= kinds
    assert model.interface.startswith("lanes 16\nmax_length 512\nstatic 0 0 0 0\ninput input_ids ")


def test_odd_sizes_equal_onnxruntime(compiled, cache):
    name = "synthetic:bert-odd"  # hidden 312, 12 heads of 26, vocabulary 1000
    assert_equals_onnx(compiled(name), name, cache)


@pytest.mark.isa("x86-avx2")
def test_avx2_row_equals_onnxruntime_and_asks_for_no_more(compiled, cache):
    model = compiled("synthetic:bert-tiny", target="x86-avx2")
    assert "avx512f" not in model.manifest["target"]["features"]
    assert_equals_onnx(model, "synthetic:bert-tiny", cache, ((2, 33),))


@pytest.fixture(scope="module")
def minilm(tmp_path_factory, cache) -> Path:
    path = tmp_path_factory.mktemp("minilm") / "bundle"
    bertile.compile("minilm", path, Config(cache_dir=cache))
    return path


def test_real_weights_have_cosine_1_with_torch(minilm):
    torch = pytest.importorskip("torch", reason="the reference is torch's own forward")
    transformers = pytest.importorskip("transformers", reason="the reference model")
    from bertile.export import checkpoints
    from bertile.run import texts

    sentences = ["A man plays a guitar.", "Stocks fell.", "It rained " * 60, "?"]
    directory = checkpoints.find_directory("minilm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    reference = transformers.AutoModel.from_pretrained(directory).eval()
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = reference(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    want = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1)).numpy()
    got = np.array(texts.run(minilm, sentences)["embeddings"])
    assert (got * want).sum(1).min() >= 0.99999


def test_second_compile_runs_no_stage_again_and_says_so(tmp_path, cache, capsys):
    config, progress = Config(cache_dir=cache), Progress(verbosity=0)
    summary = driver.compile("synthetic:bert-tiny", tmp_path / "a", config, progress)
    again = driver.compile("synthetic:bert-tiny", tmp_path / "b", config, Progress(0))
    ran = [stage["stage"] for stage in again["stages"] if not stage["cached"]]
    assert ran == ["bundle"] and summary["kernels"] == again["kernels"]
    assert "unchanged, not run again" in capsys.readouterr().err
    assert (tmp_path / "a/lib.so").read_bytes() == (tmp_path / "b/lib.so").read_bytes()


def test_dump_ir_writes_a_module_per_phase(tmp_path, cache):
    config = Config(cache_dir=cache, dump_ir=str(tmp_path / "ir"))
    driver.compile("synthetic:bert-tiny", tmp_path / "a", config)
    names = sorted(path.name for path in (tmp_path / "ir").iterdir())
    assert names == ["1-imported.py", "2-simplified.py", "3-fused.py", "4-folded.py"]
    assert "bertile.attention" in (tmp_path / "ir/3-fused.py").read_text()


def test_manifest_says_what_is_in_the_bundle(minilm):
    manifest = json.loads((minilm / "manifest.json").read_text())
    assert manifest["model"]["family"] == "bert" and manifest["model"]["max_length"] == 512
    assert manifest["check"]["max_abs_difference"] <= manifest["check"]["tolerance"]
    assert manifest["inputs"][0]["below"] == 30522
    assert all(
        kernel["provenance"] in ("tuned", "default", "generic") for kernel in manifest["kernels"]
    )


def test_difference_past_the_tolerance_is_exit_4_and_writes_nothing(tmp_path, monkeypatch):
    from bertile.backends import backend

    monkeypatch.setitem(backend.TOLERANCES, "fp32", 1e-12)
    config = Config(cache_dir=str(tmp_path / "cache"))
    with pytest.raises(NumericMismatchError, match="differs from ONNX Runtime") as caught:
        driver.compile("synthetic:bert-tiny", tmp_path / "out", config)
    assert caught.value.exit_code == 4 and not (tmp_path / "out").exists()


def test_foreign_directory_is_left_alone(tmp_path, cache):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="was not made by Bertile"):
        driver.compile("synthetic:bert-tiny", tmp_path / "out", Config(cache_dir=cache))
    assert (tmp_path / "out/thesis.txt").read_text() == "years of work"


def test_unknown_model_names_the_nearest(tmp_path):
    with pytest.raises(BertileError, match="bert-tiny"):
        driver.compile("synthetic:bert-tinny", tmp_path / "out", Config())
