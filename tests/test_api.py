"""The Python side: names at the top of the package, keywords, and a model that says what it is."""

from __future__ import annotations

import dataclasses
import inspect
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import package, tiny_bundle

import bertile
from bertile import driver
from bertile.bundle import writer
from bertile.config import Config, ConfigFields

IDS = [[1, 2, 3], [4, 5, 6]]
VOCABULARY = {"[PAD]": 0, "[UNK]": 1, "hello": 2, "world": 3}


@pytest.fixture(scope="module")
def directory(stages, tmp_path_factory) -> Path:
    manifest = {**tiny_bundle.MANIFEST, "config": {"precision": "int8"}}
    manifest["model"] = {**manifest["model"], "labels": ["bad", "good"]}
    parts = (manifest, tiny_bundle.library(stages), tiny_bundle.PARAMS, [])
    place = tmp_path_factory.mktemp("bundles") / "tiny"
    return writer.write(*parts, place, add=writer.include_runtime)


@pytest.fixture(scope="module")
def compiled(stages, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("compiled") / "bundle"
    summary = bertile.compile("synthetic:bert-tiny", place, cache_dir=Path(stages), threads=1)
    assert summary["output"] == str(place)
    return place


def test_names_of_the_package_are_there_and_are_all_that_dir_lists():
    assert dir(bertile) == sorted(bertile.__all__)
    assert [name for name in bertile.__all__ if getattr(bertile, name, None) is None] == []
    assert issubclass(bertile.UsageError, bertile.BertileError)
    assert bertile.UsageError is bertile.errors.UsageError
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        bertile.laod  # noqa: B018


def test_package_needs_numpy_alone_to_load(directory, bare, tmp_path):
    code = (
        "import sys, bertile\n"
        "assert 'numpy' not in sys.modules\n"
        f"model = bertile.load({str(directory)!r}, threads=1)\n"
        "print(type(model) is bertile.Model, model(input_ids=[[1]])['pooled'].shape)\n"
        "try: bertile.load('/no/bundle')\n"
        "except bertile.BertileError as error: print(type(error) is bertile.BundleError)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(package.linked(tmp_path))}
    run = subprocess.run(
        [str(bare), "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert run.stdout == "True (1, 8)\nTrue\n", run.stderr


@pytest.mark.parametrize(
    ("name", "module"), [("bench", "benchmark"), ("verify", "verifier")], ids=["bench", "verify"]
)
def test_folders_are_functions_too_whatever_was_imported_before(name, module):
    calls = (
        f"import inspect, bertile; a = inspect.signature(bertile.{name});"
        f"import bertile.{name}.{module} as m; b = inspect.signature(bertile.{name});"
        f"assert a == b == inspect.signature(m.{name}); assert callable(bertile.{name})"
    )
    subprocess.run([sys.executable, "-c", calls], check=True, timeout=60)


def test_verify_takes_a_path_in_words(compiled, stages):
    exported = driver.export_cached("synthetic:bert-tiny", Config(cache_dir=stages))
    check = bertile.verify(str(compiled), str(exported.onnx_path), threads=1)
    assert check["max_abs_difference"] <= check["tolerance"] and check["cosine"] > 0.9999
    assert check["precision"] == "fp32"


def test_options_are_fields_of_config_and_go_before_those_of_one(monkeypatch, tmp_path):
    seen = []

    class Stop(Exception):
        pass

    def stop(_model, config, _progress):
        seen.append(config)
        raise Stop

    monkeypatch.setattr(driver, "export_cached", stop)
    for call in (bertile.compile, driver.export):
        with pytest.raises(Stop):
            call("minilm", tmp_path, Config(threads=1, target="x86-avx2"), threads=2, lengths=[16])
    for config in seen:
        assert (config.threads, config.target, config.lengths) == (2, "x86-avx2", (16,))


def test_wrong_option_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(bertile.UsageError, match=r"no option 'precison'; did you mean 'precision'"):
        bertile.compile("minilm", tmp_path / "out", precison="int8")
    with pytest.raises(bertile.UsageError, match="precision 'int9' is unknown"):
        bertile.compile("minilm", tmp_path / "out", precision="int9")


def test_type_checkers_know_every_field_of_config():
    fields = {field.name for field in dataclasses.fields(Config)}
    assert set(ConfigFields.__annotations__) == fields


def test_model_says_what_it_is(directory):
    model = bertile.load(directory, threads=1)
    assert repr(model) == (
        "<bertile.Model tiny (bert, encoder): int8 for native, input_ids, attention_mask,"
        " token_type_ids -> hidden, pooled, blocks, at most 64 tokens, 1 thread>"
    )
    assert model.labels == ("bad", "good") and model.directory == directory and not model.closed
    model.close()
    assert model.closed and repr(model).endswith(", closed>")


def test_model_of_no_labels_has_none(compiled):
    with bertile.load(compiled) as model:
        assert model.labels == ()
        with pytest.raises(bertile.BundleError, match=r"no tokenizer\.json; call the model with"):
            model.tokenizer  # noqa: B018


def test_tokenizer_pads_and_cuts_for_the_model(directory):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.enable_padding(length=99)
    words.enable_truncation(2)
    words.save(str(directory / "tokenizer.json"))
    try:
        with bertile.load(directory) as model:
            texts = model.tokenizer.encode_batch(["hello world hello", "world " * 70])
            assert model.tokenizer is model.tokenizer
            assert [len(text.ids) for text in texts] == [64, 64]
            assert texts[0].ids[:4] == [2, 3, 2, 0] and sum(texts[0].attention_mask) == 3
            outputs = model(
                input_ids=[text.ids for text in texts],
                attention_mask=[text.attention_mask for text in texts],
            )
            assert outputs["hidden"].shape == (2, 64, 8)
            model._read_tokenizer = None
            model.manifest["text"] = {"cut_at": 2, "side": "left", "padding_id": 1}
            texts = model.tokenizer.encode_batch(["hello world hello", "world"])
            assert [text.ids for text in texts] == [[3, 2], [3, 1]]
    finally:
        (directory / "tokenizer.json").unlink()


def test_tensors_of_torch_are_inputs_like_any_other(directory):
    torch = pytest.importorskip("torch")
    with bertile.load(str(directory)) as model:
        want = model(input_ids=IDS, attention_mask=np.ones((2, 3), np.int32))
        for dtype in (torch.int64, torch.int32, torch.uint8):
            ids = torch.tensor(IDS, dtype=dtype)
            got = model(input_ids=ids, attention_mask=torch.ones(2, 3, dtype=torch.bool))
            assert all(np.array_equal(got[name], want[name]) for name in want)
        with pytest.raises(bertile.InputError, match="input_ids has dtype float32"):
            model(input_ids=torch.tensor(IDS, dtype=torch.float32))


def test_public_names_say_what_they_do():
    silent = [
        name
        for name in bertile.__all__
        if name != "__version__" and not inspect.getdoc(getattr(bertile, name))
    ]
    members = [
        f"Model.{name}"
        for name, member in inspect.getmembers(bertile.Model)
        if not name.startswith("_") and not inspect.getdoc(member) and callable(member)
    ]
    assert silent + members == []
