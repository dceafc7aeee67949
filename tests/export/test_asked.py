"""What an export wrote is a MODEL again, and an ONNX file may have its tokenizer elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers import tiny_encoder

from bertile.base.errors import ModelError, UsageError
from bertile.cli import main
from bertile.config import Config
from bertile.export import asked, exporter, files
from bertile.export.cached import export_cached
from bertile.onnx.exported import ExportedModel


@pytest.fixture
def written(exported: ExportedModel, tmp_path: Path) -> Path:
    """A copy of what `bertile export` writes, to be changed."""
    return Path(shutil.copytree(exported.directory, tmp_path / "exported"))


def test_exported_directory_is_the_same_model_under_its_own_name(written, exported, tmp_path):
    again = export_cached(written, Config(cache_dir=str(tmp_path / "stages")))
    assert again.source == str(written) and again.sha256 != exported.sha256
    assert again.onnx_path.read_bytes() == exported.onnx_path.read_bytes()
    same = ("family", "head", "max_length", "inputs", "outputs", "notes")
    assert all(getattr(again, name) == getattr(exported, name) for name in same)
    assert [path.name for path in again.files()] == [path.name for path in exported.files()]


def test_what_lies_beside_an_export_stays_there(written, tmp_path):
    config = Config(cache_dir=str(tmp_path / "stages"))
    before = exporter.fingerprint(written, config)
    (written / "notes.txt").write_text("mine")
    assert exporter.fingerprint(written, config) == before
    assert not (export_cached(written, config).directory / "notes.txt").exists()


def test_who_changes_an_export_changes_the_model(written):
    before = exporter.fingerprint(written, Config())
    with (written / "model.onnx").open("ab") as file:
        file.write(b"\0")
    assert exporter.fingerprint(written, Config()) != before


def test_exported_directory_has_the_head_that_it_was_exported_with(written):
    asked.check(written, Config(head="encoder"))
    with pytest.raises(UsageError, match="was exported with the head 'encoder', not 'masked-lm'"):
        asked.check(written, Config(head="masked-lm"))


def test_export_may_not_name_files_of_others(written):
    path = written / "export.json"
    description = json.loads(path.read_text())
    path.write_text(json.dumps({**description, "files": ["../../secret"]}))
    with pytest.raises(ModelError, match="leads out of"):
        files.exported_files(written)


@pytest.fixture
def bare(exported: ExportedModel, tmp_path: Path) -> tuple[Path, Path]:
    """An ONNX file alone, and the directory of a tokenizer."""
    (tmp_path / "bare").mkdir()
    shutil.copyfile(exported.onnx_path, tmp_path / "bare" / "model.onnx")
    (tmp_path / "words").mkdir()
    tiny_encoder.tokenizer(tmp_path / "words" / "tokenizer.json")
    (tmp_path / "words" / "config.json").write_text('{"model_type": "bert"}')
    return tmp_path / "bare" / "model.onnx", tmp_path / "words"


def test_tokenizer_of_an_onnx_file_may_lie_elsewhere(bare, tmp_path):
    model, words = bare
    config = Config(cache_dir=str(tmp_path / "stages"))
    alone = export_cached(model, config)
    assert [path.name for path in alone.files()] == [] and alone.family == "unknown"
    elsewhere = Config(cache_dir=config.cache_dir, tokenizer=words)
    asked.check(model, elsewhere)
    complete = export_cached(model, elsewhere)
    assert [path.name for path in complete.files()] == ["config.json", "tokenizer.json"]
    assert complete.family == "bert"
    before = exporter.fingerprint(model, elsewhere)
    (words / "tokenizer.json").write_text('{"version": "1.0"}')
    assert exporter.fingerprint(model, elsewhere) != before
    assert exporter.fingerprint(model, config) == alone.sha256


@pytest.mark.slow
def test_compile_takes_what_export_wrote(tmp_path, stages, capsys):
    """The whole way by hand: export, compile what it wrote, verify."""
    at = ("--cache-dir", stages)
    words = ["compile", str(tmp_path / "exported"), "-o", str(tmp_path / "out"), *at]
    assert main.main(["export", tiny_encoder.MODEL, "-o", str(tmp_path / "exported"), *at]) == 0
    assert main.main(words) == 0
    assert main.main(["verify", str(tmp_path / "out")]) == 0
    assert "within fp32's bound" in capsys.readouterr().out
