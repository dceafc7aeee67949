"""Pruned models for a GPU: what a pattern takes away as a whole is in no kernel any more."""

from __future__ import annotations

import pytest

import bertile
from bertile import loader
from bertile.compress import pruner
from bertile.config import Config
from bertile.run.cuda import emulator

SMALLER = {
    "heads": {"dense_128_192", "dense_64_128", "dense_128_512", "dense_512_128"},
    "neurons": {"dense_128_384", "dense_128_128", "dense_128_256", "dense_256_128"},
}


@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "precision"), [("heads", "fp16"), ("neurons", "int8")])
def test_kernels_of_a_pruned_model_are_smaller(tmp_path, pattern, precision):
    """Compiling runs the whole model, on a card or emulated, and compares it with ONNX Runtime."""
    if lacks := emulator.missing():
        pytest.skip(lacks)
    pruner.prune("synthetic:bert-tiny", tmp_path / "pruned", 0.5, pattern)
    config = Config(target="cuda-sm90", precision=precision, cache_dir=str(tmp_path / "cache"))
    bertile.compile(tmp_path / "pruned", tmp_path / "out", config)
    manifest = loader.read_manifest(tmp_path / "out")
    dense = [kernel for kernel in manifest["kernels"] if kernel["operation"] == "dense"]
    of_layers = [kernel for kernel in dense if kernel["shape"]["activation"] != "tanh"]  # no pooler
    names = [kernel["name"] for kernel in of_layers]
    assert {"_".join(name.split("_")[:3]) for name in names} == SMALLER[pattern]
    heads = {
        kernel["shape"]["heads"] for kernel in manifest["kernels"] if "heads" in kernel["shape"]
    }
    assert heads == ({1} if pattern == "heads" else {2})
    check = manifest["check"]
    assert check["max_abs_difference"] <= check["tolerance"] and check.get("executed", True)
