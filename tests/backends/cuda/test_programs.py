"""Graphs of all kinds for a GPU: those that passes match, those that they do not, static axes.

Their kernels are emulated, and the results compared with ONNX Runtime's.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers import programs

from bertile import loader
from bertile.backends.cuda import plan, precision_plan
from bertile.backends.cuda.backend import TOLERANCES_ON_GPU
from bertile.backends.cuda.lowering import lower
from bertile.bundle import manifest, writer
from bertile.config import Config
from bertile.graph.importer import import_onnx
from bertile.graph.order import optimize
from bertile.lower.built import Built
from bertile.onnx.samples import largest_difference, run_onnx
from bertile.run.cuda import emulated_model, emulator
from bertile.targets.rows import resolve
from bertile.tune.log import chooser
from bertile.tune.log.tuning_log import TuningLog


def emulated(exported, precision, directory):
    """The model on the emulator, without machine code for a GPU."""
    if lacks := emulator.missing():
        pytest.skip(lacks)
    row = resolve("cuda-sm80")
    graph = precision_plan.plan_layers(optimize(import_onnx(exported)), precision, row)
    choose = chooser.Chooser(TuningLog([], print), row, print)
    lowered = lower(graph, row, lambda task: choose.choose(task).knobs)
    written = plan.write(graph, lowered, row)
    contents = {"plan.json": json.dumps(written.content), "kernels.cu": written.source}
    files = {name: directory / name for name in (*contents, "kernels.cubin")}
    for name, path in files.items():
        path.write_text(contents.get(name, ""))
    built = Built(files, written.params, [], lowered.fallthrough)
    config = Config(target=row.name, precision=precision)
    described = manifest.describe(graph, built, row, config, {})
    return emulated_model.Model(
        writer.write(described, files, written.params, [], directory / "out")
    )


def check(exported, precision, directory, requests):
    model = emulated(exported, precision, directory)
    for lengths in requests:
        arrays = programs.request_of(exported, lengths)
        answers, want = model(**arrays), run_onnx(exported.onnx_path, arrays)
        for name, reference in want.items():
            limit = TOLERANCES_ON_GPU[precision] * max(1.0, float(np.abs(reference).max()))
            mask = arrays["attention_mask"]
            assert largest_difference(answers[name], reference, mask) <= limit
    return model


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", {**programs.UNMATCHED, **programs.MATCHED})
def test_a_graph_answers_as_onnx_runtime(name, precision, tmp_path):
    unmatched = name in programs.UNMATCHED  # some of these look at padding too
    body = programs.UNMATCHED[name][0] if unmatched else programs.MATCHED[name]
    requests = ([3], [37, 37] if unmatched else [37, 20])
    check(programs.exported_of(body, tmp_path), precision, tmp_path, requests)


def test_static_axes_are_right(tmp_path):
    body = programs.MATCHED["attention"]
    exported = programs.exported_of(body, tmp_path, batch=2, length=20)
    model = check(exported, "fp32", tmp_path, ([20, 7],))
    assert loader.read_manifest(tmp_path / "out")["static"] == {"batch": 2, "length": 20}
    assert model.plan["outputs"][0]["shape"][:2] == [2, 20]
