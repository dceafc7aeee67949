"""Bundles on a GPU against ONNX Runtime; memory, threads and tensors. Without a card the same
checks run on the pretended device, on less.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers import pretended_gpu as pretended

import bertile
from bertile import cuda_loader
from bertile.export import cached
from bertile.run.cuda import emulated_model, emulator
from bertile.studies import cuda_checks, cuda_package

CARD = pytest.param("card", marks=pytest.mark.gpu)


def compiled(name: str, precision: str, target: str, directory, shapes=cuda_checks.SHAPES):
    """A bundle, with ONNX Runtime's answers in it."""
    config = bertile.Config(target=target, precision=precision, runtime="include")
    bertile.compile(f"synthetic:{name}", directory, config)
    exported = cached.export_cached(f"synthetic:{name}", config)
    cuda_package.answer(exported, precision, directory / cuda_checks.ANSWERS, shapes)
    return directory


@pytest.fixture(scope="module")
def row():
    """The target of the card that is here."""
    from bertile.tune.measure.cuda.card import Card

    return f"cuda-sm{Card().facts()['capability']}"


@pytest.fixture(scope="module", params=["pretended", CARD])
def model(request, tmp_path_factory):
    """A two-layer model on the card, or on the driver that pretends to be one."""
    directory = tmp_path_factory.mktemp("gpu") / "bert-tiny-fp16"
    if request.param == "card":
        compiled("bert-tiny", "fp16", request.getfixturevalue("row"), directory)
        with cuda_loader.load(directory) as opened:
            yield opened, directory
        return
    library = pretended.driver()
    compiled("bert-tiny", "fp16", "cuda-sm90", directory, [(1, 1), (2, 17)])
    source = (directory / emulated_model.SOURCE).read_text(encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BERTILE_EMULATED_KERNELS", str(emulator.build(source, emulator.kept())))
        with cuda_loader.load(directory, driver=str(library)) as opened:
            yield opened, directory


@pytest.fixture
def few(model, monkeypatch):
    """Requests that the pretended device answers in no time."""
    if "emulated" in model[0].gpu.name:
        monkeypatch.setattr(cuda_checks, "SHAPES", ((1, 1), (2, 3), (1, 17)))
        return True
    return False


def test_numbers_are_those_of_onnx_runtime(model):
    assert "of the tolerance" in cuda_checks.numbers(model[0], model[1] / cuda_checks.ANSWERS)


def test_calls_of_changing_shapes_hold_their_memory(model, few):
    assert cuda_checks.memory(model[0], 12 if few else cuda_checks.CALLS)


def test_threads_that_call_at_once_get_their_own_results(model, few):
    assert cuda_checks.streams(model[0], *((2, 3) if few else ()))


def test_wrong_numbers_are_found(model, tmp_path):
    """A check that cannot fail is none."""
    with np.load(model[1] / cuda_checks.ANSWERS) as file:
        arrays = {name: file[name] + (0.5 if ".out." in name else 0) for name in file.files}
    np.savez(tmp_path / "answers.npz", **arrays)
    with pytest.raises(AssertionError, match="times what may be off"):
        cuda_checks.numbers(model[0], tmp_path / "answers.npz")


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "precision"), cuda_package.CHECKED)
def test_every_family_and_precision_on_a_card(name, precision, row, tmp_path):
    directory = compiled(name, precision, row, tmp_path / f"{name}-{precision}")
    with cuda_loader.load(directory) as opened:
        cuda_checks.numbers(opened, directory / cuda_checks.ANSWERS)


@pytest.mark.gpu
def test_tensors_of_torch_are_read_in_place(model):
    pytest.importorskip("torch")
    if "emulated" in model[0].gpu.name:
        pytest.skip("torch has no tensors on the pretended device")
    assert "torch" in cuda_checks.tensors(model[0])


def test_script_that_travels_checks_a_directory_of_bundles(model, few, tmp_path):
    """With numpy and what lies in the bundles, as on the machine that it is carried to."""
    if not few:
        pytest.skip("on a card the script runs by itself")
    shutil.copytree(model[1], tmp_path / "all" / "bert-tiny-fp16")
    shutil.copyfile(cuda_checks.__file__, tmp_path / "cuda_checks.py")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
for name in ("bertile", "tvm", "onnx", "torch"):
    sys.modules[name] = None
import cuda_checks
cuda_checks.SHAPES = {cuda_checks.SHAPES}
cuda_checks.memory.__defaults__, cuda_checks.streams.__defaults__ = (12,), (2, 3)
sys.exit(cuda_checks.main([{str(tmp_path / "all")!r}]))
"""
    env = {**os.environ, "LD_LIBRARY_PATH": str(pretended.driver().parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert [line.split(":")[0].split() for line in done.stdout.splitlines()[:-1]] == [
        ["ok", "bert-tiny-fp16", "numbers"],
        ["ok", "bert-tiny-fp16", "memory"],
        ["ok", "bert-tiny-fp16", "streams"],
        ["FAILED", "bert-tiny-fp16", "tensors"],  # there is no torch
    ], done.stderr
    assert "4 checks, 1 failed" in done.stdout and done.returncode == 1
