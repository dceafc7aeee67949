"""Whole models for a GPU: compiled, loaded by the loader on a driver that emulates kernels, and
compared with ONNX Runtime. Families and rows that need not be looked at every time are slow.
"""

from __future__ import annotations

import itertools
import json
import shutil

import numpy as np
import pytest
from helpers import family_models
from helpers.fake_driver import build_driver

from bertile import cuda_loader, driver, loader
from bertile.backends.cuda.backend import TOLERANCES_ON_GPU
from bertile.base.errors import PlatformError
from bertile.cli import main
from bertile.config import Config
from bertile.export import cached
from bertile.families.decoders import DECODERS
from bertile.families.table import of_type
from bertile.onnx.exported import read
from bertile.onnx.samples import largest_difference, run_onnx, sample
from bertile.run.cuda import emulator
from bertile.targets.rows import TABLE, resolve

ROWS = [row.name for row in TABLE if row.gpu]
SMALL = "synthetic:bert-tiny"
FAMILIES = (
    *(f"{family}-tiny" for family in family_models.OTHERS),
    *(f"{family.name}-tiny" for family in DECODERS),
    *(f"bert-tiny:{head}" for head in of_type("bert").heads[2:]),
    *(f"qwen3-tiny:{head}" for head in of_type("qwen3").heads[1:]),  # read at their last token
    "bert-odd",
)
CASES = [
    *itertools.product(FAMILIES, ("fp32", "fp16", "int8")),
    *itertools.product(("gemma3-tiny", "modernbert-tiny", "deberta-v2-tiny"), ("bf16", "tf32")),
]


@pytest.fixture(scope="module")
def fake_driver(tmp_path_factory):
    """A library in the place of the driver's, on which kernels are emulated."""
    if lacks := emulator.missing():
        pytest.skip(lacks)
    return build_driver(tmp_path_factory.mktemp("driver"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


def compiled(name, precision, target, cache, tmp_path, **options):
    config = Config(target=target, precision=precision, cache_dir=cache, **options)
    return driver.compile(name, tmp_path / "bundle", config)


def onnx_of(name, cache):
    return read(cached.export_cached(name, Config(cache_dir=cache)).directory)


def check_bundle(path, name, precision, cache, fake_driver, tmp_path, monkeypatch):
    """The loader's answers for several shapes, unequal lengths among them."""
    source = (path / "kernels.cu").read_text(encoding="utf-8")
    monkeypatch.setenv("BERTILE_EMULATED_KERNELS", str(emulator.build(source, emulator.kept())))
    own = shutil.copyfile(fake_driver, tmp_path / "libcuda.so.1")
    exported = onnx_of(name, cache)
    padding = family_models.padding_id(exported)
    with cuda_loader.load(path, driver=str(own)) as model:
        for batch, length in ((1, 1), (3, 37), (2, 16), (3, 37)):
            arrays = sample(exported.inputs, batch, length, padding, seed=length)
            wanted, answers = run_onnx(exported.onnx_path, arrays), model(**arrays)
            mask = arrays.get("attention_mask", np.ones((batch, length)))
            for output, reference in wanted.items():
                limit = TOLERANCES_ON_GPU[precision] * max(1.0, float(np.abs(reference).max()))
                assert largest_difference(answers[output], reference, mask) <= limit


def check_manifest(path, precision, row):
    manifest = loader.read_manifest(path)
    assert manifest["target"] == {
        "name": row.name,
        "arch": "cuda",
        "features": [f"sm_{row.gpu.capability}"],
    }
    parts = {"plan.json", "kernels.cubin", "kernels.ptx", "kernels.cu", "params.safetensors"}
    assert set(manifest["files"]) >= parts and "lib.so" not in manifest["files"]
    assert manifest["versions"]["cuda_compiler"].split()[0] in ("nvcc", "nvrtc")
    on_tokens = precision if precision != "fp32" else None
    for kernel in manifest["kernels"]:
        assert kernel["calls"] >= 1 and kernel["entries"]
        for takes in kernel["entries"].values():
            assert 0 < takes["registers"] <= 255
            assert takes["registers"] * 32 <= row.gpu.registers_per_sm
            assert takes["shared"] <= 48 << 10
        dense = kernel["operation"] in ("dense", "attention")
        if dense and str(kernel["shape"]["precision"]).startswith(on_tokens or "no"):
            assert all(takes["tensor"] for takes in kernel["entries"].values())
    steps = json.loads((path / "plan.json").read_text())["steps"]
    assert all(step["shared"] <= row.gpu.shared_per_block for step in steps)
    assert all(step["threads"] % 32 == 0 for step in steps)


@pytest.mark.parametrize("precision", ["fp16", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_compiled_model_answers_as_onnx_runtime(
    precision, cache, fake_driver, tmp_path, monkeypatch, capsys
):
    summary = compiled(SMALL, precision, "cuda-sm90", cache, tmp_path, runtime="include")
    path = tmp_path / "bundle"
    names = {file.name for file in path.iterdir()}
    assert {"loader.py", "cuda_loader.py"} <= names and "runtime" not in names
    assert main.main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert "registers" in text and f"dense_128_384_{precision}_many" in text
    check = loader.read_manifest(path)["check"]
    assert check["max_abs_difference"] <= check["tolerance"]
    assert "emulator" in check or "gpu" in check
    assert (summary["milliseconds"] is None) == ("gpu" not in check)
    assert set(summary["kernels"]) == {"tuned", "nearest", "default", "generic"}
    check_manifest(path, precision, resolve("cuda-sm90"))
    check_bundle(path, SMALL, precision, cache, fake_driver, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16", "int8"])
@pytest.mark.parametrize("target", ROWS)
def test_every_row_builds_the_two_layer_model(
    target, precision, cache, fake_driver, tmp_path, monkeypatch
):
    row = resolve(target)
    if precision in ("tf32", "bf16") and not row.gpu.async_copy:
        with pytest.raises(PlatformError, match=f"target {target} has no"):
            compiled(SMALL, precision, target, cache, tmp_path)
        return
    compiled(SMALL, precision, target, cache, tmp_path)
    check_manifest(tmp_path / "bundle", precision, row)
    if target == "cuda-sm90":  # the driver in the place of NVIDIA's is of such a card
        arguments = (SMALL, precision, cache, fake_driver, tmp_path, monkeypatch)
        check_bundle(tmp_path / "bundle", *arguments)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "precision"), CASES)
def test_every_family_answers_as_onnx_runtime(
    name, precision, cache, fake_driver, tmp_path, monkeypatch
):
    model = f"synthetic:{name}"
    compiled(model, precision, "cuda-sm90", cache, tmp_path)
    check_manifest(tmp_path / "bundle", precision, resolve("cuda-sm90"))
    arguments = (model, precision, cache, fake_driver, tmp_path, monkeypatch)
    check_bundle(tmp_path / "bundle", *arguments)


@pytest.mark.slow
def test_static_ranges_and_smoothing_answer_as_onnx_runtime(
    cache, fake_driver, tmp_path, monkeypatch
):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(" ".join(str(7 * i % 90 + j) for j in range(9)) for i in range(9)))
    options = {"calibrate": str(texts), "ranges": "minmax", "smooth": 0.5}
    compiled("minilm", "int8", "cuda-sm90", cache, tmp_path, **options)
    kernels = loader.read_manifest(tmp_path / "bundle")["kernels"]
    assert any(kernel["shape"].get("precision") == "int8_static" for kernel in kernels)
    check = loader.read_manifest(tmp_path / "bundle")["check"]
    assert check["max_abs_difference"] <= check["tolerance"]
