"""The whole program: every family and head against ONNX Runtime, real weights against torch."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import family_models, programs

import bertile
from bertile import driver, loader
from bertile.base.errors import BertileError, NumericMismatchError, UsageError
from bertile.base.progress import Progress
from bertile.config import Config
from bertile.export.cached import export_cached
from bertile.onnx.exported import ExportedModel
from bertile.onnx.samples import largest_difference, sample, session
from bertile.tune.log.tuning_log import ORIGINS

# With `test_encoder…`, `test_odd_sizes…` (masked-lm) and `test_real_weights…` (embedding) each path
# through a head once, and every family in families/test_directories; the other pairs take minutes.
QUICK = [("bert", "question-answering")]  # which has two outputs, by token
PAIRS = [
    pytest.param(family, head, marks=() if (family, head) in QUICK else pytest.mark.slow)
    for family, head in family_models.PAIRS
    if head != "encoder"
]
SHAPES = ((1, 1), (1, 511), (7, 33))
TOLERANCE = 2e-5  # float32 sums in another order, relative to the largest value of the output


@pytest.fixture
def compiled(tmp_path, stages):
    def compile_model(model: str, **config) -> loader.Model:
        bertile.compile(model, tmp_path / "bundle", Config(cache_dir=stages, **config))
        return bertile.load(tmp_path / "bundle")

    return compile_model


def assert_equals_onnx(model: loader.Model, exported: ExportedModel, shapes=SHAPES) -> None:
    peer = session(exported.onnx_path)
    for batch, length in shapes:
        arrays = sample(exported.inputs, batch, length, padding_id=1, seed=length)
        got, want = model(**arrays), peer.run(None, arrays)
        for output, reference in zip(exported.outputs, want):
            difference = largest_difference(got[output], reference, arrays["attention_mask"])
            assert difference <= TOLERANCE * max(1, np.abs(reference).max()), (batch, length)


def assert_model_equals_onnx(name: str, head: str, compiled, stages: str) -> loader.Model:
    """Of the directory that other files export and compile too."""
    model = compiled(str(family_models.directory(name, head, stages)), head=head)
    assert_equals_onnx(model, family_models.exported(name, head, stages))
    return model


@pytest.mark.parametrize(("family", "head"), PAIRS)
def test_every_family_and_head_equals_onnxruntime(family, head, compiled, stages):
    model = assert_model_equals_onnx(f"{family}-tiny", head, compiled, stages)
    kinds = {kernel["operation"] for kernel in model.manifest["kernels"]}
    assert {"dense", "attention", "layer_norm", "embedding"} <= kinds
    assert model.interface.startswith("lanes 16\nmax_length 512\nstatic 0 0 0 0\ninput input_ids ")


def test_encoder_equals_onnxruntime(compiled, exported):
    assert_equals_onnx(compiled("synthetic:bert-tiny"), exported)


def test_odd_sizes_and_a_masked_lm_equal_onnxruntime(compiled, stages):
    """Hidden 312, 12 heads of 26, vocabulary 1000."""
    assert_model_equals_onnx("bert-odd", "masked-lm", compiled, stages)


@pytest.mark.isa("x86-avx2")
def test_avx2_row_equals_onnxruntime_and_asks_for_no_more(compiled, exported):
    model = compiled("synthetic:bert-tiny", target="x86-avx2")
    assert "avx512f" not in model.manifest["target"]["features"]
    assert_equals_onnx(model, exported, ((2, 33),))


@pytest.fixture(scope="module")
def minilm(tmp_path_factory, stages) -> Path:
    path = tmp_path_factory.mktemp("minilm") / "bundle"
    bertile.compile("minilm", path, Config(cache_dir=stages))
    return path


def test_real_weights_and_an_embedding_equal_onnxruntime(minilm, stages):
    exported = export_cached("minilm", Config(cache_dir=stages))
    assert exported.head == "embedding"
    assert_equals_onnx(bertile.load(minilm), exported)


def test_real_weights_have_cosine_1_with_torch(minilm):
    torch = pytest.importorskip("torch", reason="the reference is torch's own forward")
    transformers = pytest.importorskip("transformers", reason="the reference model")
    from bertile.export import checkpoints

    sentences = ["A man plays a guitar.", "Stocks fell.", "It rained " * 60, "?"]
    directory = checkpoints.find_directory("minilm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    reference = transformers.AutoModel.from_pretrained(directory).eval()
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = reference(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    want = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1)).numpy()
    with bertile.open(minilm) as model:
        got = model.encode(sentences)
    assert (got * want).sum(1).min() >= 0.99999


def test_tokenizer_of_a_bundle_is_that_of_its_library_by_itself(minilm):
    """Its file came padding and cutting at 128, its library cuts at 256."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers", reason="the reference tokenizer")
    from bertile.export import checkpoints

    sentences = ["A man plays a GUITAR.", "Étude", "日本", "", "It rained " * 200]
    directory = checkpoints.find_directory("minilm")
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer = tokenizers.Tokenizer.from_file(str(minilm / "tokenizer.json"))
    assert tokenizer.padding is None and tokenizer.truncation is None
    want = theirs(sentences, truncation=False)["input_ids"]
    assert [tokenizer.encode(sentence).ids for sentence in sentences] == want
    with bertile.load(minilm) as model:
        cut = model.tokenizer.encode_batch(sentences)
        assert len(cut[0].ids) == model.manifest["text"]["longest"] == 256
    wanted = theirs(sentences, truncation=True, max_length=256, padding=True)
    assert [encoding.ids for encoding in cut] == wanted["input_ids"]


def test_second_compile_runs_no_stage_again_and_says_so(tmp_path, stages, capsys):
    config, progress = Config(cache_dir=stages), Progress(verbosity=0)
    summary = driver.compile("synthetic:bert-tiny", tmp_path / "a", config, progress)
    again = driver.compile("synthetic:bert-tiny", tmp_path / "b", config, Progress(0))
    ran = [stage["stage"] for stage in again["stages"] if not stage["cached"]]
    assert ran == ["bundle"] and summary["kernels"] == again["kernels"]
    assert "cached" in capsys.readouterr().err
    assert (tmp_path / "a/lib.so").read_bytes() == (tmp_path / "b/lib.so").read_bytes()


def test_dump_ir_writes_a_module_per_phase(tmp_path, stages):
    config = Config(cache_dir=stages, dump_ir=str(tmp_path / "ir"))
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
        kernel["provenance"] in (*ORIGINS, "default", "generic") for kernel in manifest["kernels"]
    )


def test_difference_past_the_tolerance_is_exit_4_and_writes_nothing(tmp_path, monkeypatch):
    from bertile.backends import backend

    monkeypatch.setitem(backend.TOLERANCES, "fp32", 1e-12)
    model = programs.exported_of(programs.MATCHED["attention"], tmp_path).onnx_path
    config = Config(cache_dir=str(tmp_path / "cache"), runtime="none")
    with pytest.raises(NumericMismatchError, match="differs from ONNX Runtime") as caught:
        driver.compile(model, tmp_path / "out", config)
    assert caught.value.exit_code == 4 and not (tmp_path / "out").exists()


def test_foreign_directory_is_left_alone(tmp_path, stages):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="was not made by Bertile"):
        driver.compile("synthetic:bert-tiny", tmp_path / "out", Config(cache_dir=stages))
    assert (tmp_path / "out/thesis.txt").read_text() == "years of work"


def test_unknown_model_names_the_nearest(tmp_path):
    with pytest.raises(BertileError, match="bert-tiny"):
        driver.compile("synthetic:bert-tinny", tmp_path / "out", Config())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("vocabulary", "padding"), [(30, 29), (1000, 999), (1000, -1), (1000, None)], ids=str
)
@pytest.mark.parametrize(("precision", "most"), [("fp32", TOLERANCE), ("int8", 0.25)])
def test_any_padding_id_compiles_in_any_precision(
    vocabulary, padding, precision, most, compiled, stages, tmp_path
):
    """A table of 30 characters or amino acids whose last row is padding, as well as no such row."""
    place = shutil.copytree(family_models.directory("bert-tiny", "encoder", stages), tmp_path / "m")
    untouched = family_models.untouched("bert-tiny", "encoder")
    untouched.resize_token_embeddings(vocabulary, mean_resizing=False)
    untouched.config.pad_token_id = padding
    untouched.save_pretrained(place)
    model = compiled(str(place), precision=precision)
    exported = export_cached(str(place), Config(cache_dir=stages))
    for batch, length in ((1, 1), (3, 37)):
        arrays = sample(exported.inputs, batch, length, max(0, padding or 0), seed=length)
        got, want = model(**arrays), family_models.torch_outputs(untouched, "encoder", arrays)
        for output, reference in want.items():
            difference = largest_difference(got[output], reference, arrays["attention_mask"])
            assert difference <= most * max(1, np.abs(reference).max())


@pytest.mark.parametrize(("drop", "asks"), [(0.5, True), ("10%", False)])
def test_large_accepted_loss_is_asked_about(tmp_path, drop, asks):
    stream = io.StringIO()
    config = Config(precision="int8", max_drop=drop, eval="x.tsv", cache_dir=str(tmp_path))
    with pytest.raises(BertileError):  # there is no such model
        driver.compile(tmp_path / "none", tmp_path / "out", config, Progress(0, stream))
    assert ("accepts a loss of 50 points of 100; is 0.5% meant?" in stream.getvalue()) == asks
