"""Compiles a graph whose layers know their precision."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.smallest import Smallest

from bertile import loader
from bertile.backends.cpu import builder
from bertile.onnx.samples import sample
from bertile.schedules import BLOCK_TOKENS
from bertile.targets.rows import resolve
from bertile.tune.log.tuning_log import TuningLog

BF16, VNNI, PLAIN = (
    resolve(name, threads=1) for name in ("x86-avx512-bf16", "x86-avx512-vnni", "x86-avx512")
)


def compiled(graph, row, directory, exported):
    """A graph, built of the smallest kernels, as a function of (batch, length) that gives the
    outputs and the model's inputs, to which `change` may have done something; what was built is
    its attribute `built`.
    """
    if lacks := set(row.features) - loader.cpu_features():
        pytest.skip(f"this CPU lacks {' '.join(sorted(lacks))}")
    import tvm
    from tvm import relax

    chooser = Smallest(TuningLog([], print), row, print)
    built = builder.build(graph, chooser, row, directory / "lib.so")
    vm = relax.VirtualMachine(tvm.runtime.load_module(str(built.library)), tvm.cpu())

    def call(batch, length, change=lambda arrays: None):
        arrays = sample(exported.inputs, batch, length, 0, seed=3)
        change(arrays)
        mask = arrays.get("attention_mask", np.ones((batch, length), "int64"))
        blocks = loader.token_blocks(mask, BLOCK_TOKENS).astype("int32")
        arguments = [*arrays.values(), blocks, *built.params.values()]
        outputs = [output.numpy() for output in vm["main"](*map(tvm.runtime.tensor, arguments))]
        return [output[mask > 0] if output.ndim == 3 else output for output in outputs], arrays

    call.built = built
    return call
