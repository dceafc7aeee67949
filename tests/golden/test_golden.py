"""The optimized graph of the two-layer model, as text: what a change of a pass changes is seen.

``pytest tests/golden --update-golden`` writes the files anew; look at the difference before you
commit it.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bertile.backends.cpu.lowering import lower
from bertile.graph.importer import import_onnx
from bertile.graph.order import optimize
from bertile.schedules.cpu import SCHEDULES
from bertile.targets.rows import resolve

HERE = Path(__file__).parent


@pytest.fixture
def golden(update_golden):
    """Compares a text with the file of that name."""

    def check(name: str, text: str) -> None:
        path = HERE / name
        if update_golden:
            path.write_text(text)
        assert path.read_text() == text, "if this is meant: pytest tests/golden --update-golden"

    return check


def readable(script: str) -> str:
    """One parameter per line."""
    lines = []
    for line in script.splitlines():
        if line.strip().startswith("def "):
            line = re.sub(r"(, )(?=\w+: R\.Tensor)", ",\n        ", line)
        lines.append(line.rstrip())
    return "\n".join(lines) + "\n"


def body(script: str) -> str:
    """The calls alone: how weights are packed is up to the knobs."""
    return readable(script[script.index("with R.dataflow()") :])


def test_optimized_graph_is_as_it_was(exported, golden):
    golden("bert-tiny-optimized.txt", readable(optimize(import_onnx(exported)).mod.script()))


def test_kernels_are_as_they_were(exported, golden):
    """The calls of the lowered graph with the weights that each one reads."""
    row = resolve("x86-avx512", threads=1)
    graph = optimize(import_onnx(exported))
    lowered = lower(graph, row, lambda task: SCHEDULES[task.operation].default(task, row))
    golden("bert-tiny-lowered.txt", body(lowered.mod["main"].script()))


def test_graph_is_the_same_in_every_run(exported):
    first, second = (optimize(import_onnx(exported)) for _ in range(2))
    assert first.mod.script() == second.mod.script()
    assert list(first.params) == list(second.params)
