"""Bundles for ARM, opened here: verified, and asked for the accuracy of int8."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import arm_code

from bertile import driver, loader
from bertile.base.errors import BundleError, PlatformError
from bertile.cli import main
from bertile.config import Config
from bertile.evaluation.sentences import sentences
from bertile.run import opener, qemu
from bertile.verify import verifier

TINY = "synthetic:bert-tiny"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, stages) -> Path:
    """A bundle for ARM without a runtime, which its compile has run."""
    arm_code.need_emulator()
    output = tmp_path_factory.mktemp("arm") / "bundle"
    driver.compile(TINY, output, config(stages, runtime_from=str(arm_code.RUNTIME)))
    return output


def config(stages: str, **more: object) -> Config:
    return Config(target="arm-a76", runtime="none", cache_dir=stages, **more)


def test_verify_finds_what_the_compile_found(bundle):
    check = verifier.verify(bundle, parts=opener.parts_of(bundle, str(arm_code.RUNTIME)))
    assert check["emulator"] == "qemu-aarch64 -cpu cortex-a76"
    assert check == loader.read_manifest(bundle)["check"]


def test_verify_as_a_command_says_what_ran_the_bundle(bundle, capsys):
    assert main.main(["verify", str(bundle), "--runtime-from", str(arm_code.RUNTIME)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("largest error ") and "run by qemu-aarch64 -cpu cortex-a76" in text


def test_bundle_that_brings_its_runtime_needs_no_other(stages, tmp_path, monkeypatch):
    arm_code.need_emulator()
    arm_code.compile(TINY, tmp_path / "out", stages, "arm-a72", "fp32")
    monkeypatch.setattr(opener.runtime_parts, "find", None)
    with opener.opened(tmp_path / "out", threads=1) as model:
        assert model.inputs == ("input_ids", "attention_mask", "token_type_ids")
        assert model(input_ids=[[1, 2, 3]])["last_hidden_state"].shape == (1, 3, 128)
    with (tmp_path / "out" / loader.LIBRARY).open("ab") as file:
        file.write(b" ")
    with pytest.raises(BundleError, match=r"lib\.so has"):
        opener.opened(tmp_path / "out")


def test_what_has_to_run_a_bundle_is_refused_without_an_emulator(
    tmp_path, stages, monkeypatch, capsys
):
    (tmp_path / "x.txt").write_text("One.\nTwo.\nThree.\n")
    monkeypatch.setattr(qemu, "_qemu", lambda arch: None)
    driver.compile(TINY, tmp_path / "out", config(stages, head="embedding"))
    assert main.main(["verify", str(tmp_path / "out")]) == 3
    reason = "a bundle for arm-a76 cannot be run here: qemu-aarch64 is not installed"
    assert reason in capsys.readouterr().err
    measured = {"precision": "int8", "max_drop": 0.1, "eval": str(tmp_path / "x.txt")}
    with pytest.raises(PlatformError, match=reason):
        driver.compile(TINY, tmp_path / "int8", config(stages, head="embedding", **measured))
    assert not (tmp_path / "int8").exists()


def test_bundle_for_musl_is_refused(tmp_path, stages):
    driver.compile(TINY, tmp_path / "out", config(stages, libc="musl"))
    with pytest.raises(PlatformError, match="cannot be run here: it is linked for musl"):
        opener.opened(tmp_path / "out")


@pytest.mark.slow
def test_accuracy_of_int8_is_measured_as_arm_code(tmp_path, stages):
    arm_code.need_emulator()
    (tmp_path / "x.txt").write_text("\n".join(sentences(12)))
    measured = {"precision": "int8", "max_drop": 0.02, "eval": str(tmp_path / "x.txt")}
    runtime = str(arm_code.RUNTIME)
    driver.compile("minilm", tmp_path / "out", config(stages, runtime_from=runtime, **measured))
    accuracy = loader.read_manifest(tmp_path / "out")["quantization"]["accuracy"]
    assert [attempt["kept"] for attempt in accuracy["tried"]] == [0]
    assert 0.98 <= accuracy["tried"][0]["score"] < 0.9999
