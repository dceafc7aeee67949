"""TVM comes without torch where nothing has imported that, and both work beside each other."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bertile.base import tvm_alone


def said(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return run.stdout.strip()


def test_torch_is_imported_by_whoever_needs_it():
    pytest.importorskip("torch")
    code = """
import sys
from bertile.base import tvm_alone
tvm = tvm_alone.load()
print([name for name in sys.modules if name.partition(".")[0] == "torch"])
import numpy as np
import torch
array = tvm.runtime.tensor(np.ones(3, "float32"))
print(float(torch.from_numpy(array.numpy()).sum()), tvm_alone.load() is tvm)
"""
    assert said(code).splitlines() == ["[]", "3.0 True"]


def test_what_is_imported_is_kept():
    torch = pytest.importorskip("torch")
    assert tvm_alone.load() is tvm_alone.load() and sys.modules["torch"] is torch


def test_a_trial_starts_without_torch():
    code = "import sys, bertile.tune.measure.trial; print('torch' in sys.modules)"
    assert said(code) == "False"
