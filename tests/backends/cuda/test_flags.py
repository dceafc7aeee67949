"""What a compile for a GPU is asked for: refused at once where it means nothing, or done."""

from __future__ import annotations

import pytest

from bertile import driver, loader
from bertile.base.errors import PlatformError, UsageError
from bertile.config import Config
from bertile.run.cuda import opener as gpu_check
from bertile.targets import detect


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"libc": "musl"}, UsageError, "--libc has no meaning for cuda-sm75"),
        ({"runtime_from": "x.whl"}, UsageError, "--runtime-from has no meaning for cuda-sm75"),
        ({"sparse": "always"}, UsageError, "no kernel for cuda-sm75 skips zeros"),
        ({"precision": "bf16"}, PlatformError, "cuda-sm75 has no bfloat16: .* --precision fp16"),
        ({"precision": "tf32"}, PlatformError, "cuda-sm75 has no tf32"),
    ],
)
def test_what_means_nothing_on_a_gpu_is_refused_at_once(options, error, text, tmp_path):
    with pytest.raises(error, match=text):
        driver.compile("no such model", tmp_path / "out", Config(target="cuda-sm75", **options))


def test_max_drop_wants_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(detect, "gpu", lambda: "there is no GPU")
    options = {"precision": "int8", "max_drop": 0.1, "eval": "eval.tsv"}
    text = "--max-drop runs the model on many texts, and there is no GPU; compile on a machine"
    with pytest.raises(PlatformError, match=text):
        driver.compile("no such model", tmp_path / "out", Config(target="cuda-sm90", **options))


def test_a_large_model_is_not_emulated(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "LIMIT", 1000)
    monkeypatch.setattr(detect, "gpu", lambda: "there is no GPU")
    described = {"kernels": [{"shape": {"inputs": 128, "outputs": 8}, "calls": 1}]}
    monkeypatch.setattr(loader, "read_manifest", lambda directory: described)
    reason = gpu_check.open_model(tmp_path)
    assert reason == "there is no GPU, and the model is too large for the emulator"
