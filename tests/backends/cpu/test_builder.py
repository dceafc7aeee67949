"""From a graph to a linked library that answers as ONNX Runtime does, matched by passes or not."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import tvm
import tvm_ffi
from helpers.programs import MATCHED, UNMATCHED, exported_of, request_of
from helpers.smallest import Smallest
from tvm import relax, tirx

from bertile.backends.cpu import builder
from bertile.backends.cpu.lowering import lower
from bertile.graph.importer import import_onnx
from bertile.graph.order import optimize
from bertile.loader import token_blocks
from bertile.onnx.exported import ExportedModel
from bertile.onnx.samples import largest_difference, run_onnx
from bertile.schedules import BLOCK_TOKENS
from bertile.targets import rows
from bertile.tune.log.chooser import Chooser
from bertile.tune.log.tuning_log import TuningLog

# Two layers in float32, summed in another order than ONNX Runtime does.
TOLERANCE = 5e-5


def chooser_of(row, kind=Chooser) -> Chooser:  # no log: the schedules' own knobs
    return kind(TuningLog([], print), row, print)


class Program:
    """A built library under TVM's own virtual machine."""

    def __init__(self, exported: ExportedModel, library, chooser=Chooser) -> None:
        self.exported = exported
        graph = optimize(import_onnx(exported))
        row = rows.resolve("native", threads=1)
        self.built = builder.build(graph, chooser_of(row, chooser), row, library)
        module = tvm.runtime.load_module(str(self.built.library))
        self.main = relax.VirtualMachine(module, tvm.cpu())["main"]
        self.params = [tvm.runtime.tensor(value) for value in self.built.params.values()]

    def difference(self, arrays) -> float:
        """The largest difference to ONNX Runtime over all results, at real tokens."""
        shape = next(iter(arrays.values())).shape
        mask = arrays.get("attention_mask", np.ones(shape, "int64"))
        table = token_blocks(mask, BLOCK_TOKENS).astype("int32")
        inputs = [tvm.runtime.tensor(arrays[tensor.name]) for tensor in self.exported.inputs]
        results = self.main(*inputs, tvm.runtime.tensor(table), *self.params)
        want = run_onnx(self.exported.onnx_path, arrays)
        assert len(results) == len(self.exported.outputs)
        return max(
            largest_difference(got.numpy(), want[name], mask)
            for name, got in zip(self.exported.outputs, results)
        )

    def calls(self) -> Counter:
        """How often each operation's kernels are called."""
        return sum(
            (Counter({kernel["operation"]: kernel["calls"]}) for kernel in self.built.kernels),
            Counter(),
        )


@pytest.fixture(scope="module")
def tiny(exported, tmp_path_factory) -> Program:
    return Program(exported, tmp_path_factory.mktemp("tiny") / "lib.so")


LENGTHS = {
    "one token": [1],
    "one block": [16],
    "two unequal": [37, 20],
    "seven unequal": [50, 1, 16, 17, 33, 49, 2],
    "the longest but one": [511],
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_library_equals_onnx_runtime(tiny, lengths):
    assert tiny.difference(request_of(tiny.exported, lengths)) < TOLERANCE


def test_library_equals_onnx_runtime_when_all_rows_are_padded(tiny):
    assert tiny.difference(request_of(tiny.exported, [5, 18], padded=70)) < TOLERANCE


def test_library_equals_onnx_runtime_when_a_hole_is_masked(tiny):
    arrays = request_of(tiny.exported, [40, 33])
    arrays["attention_mask"][0, 5:20] = 0
    assert tiny.difference(arrays) < TOLERANCE


def test_encoder_layer_is_seven_kernels(tiny):
    layers, calls = 2, tiny.calls()
    assert calls["attention"] == layers
    assert calls["layer_norm"] == 2 * layers
    assert calls["dense"] == 4 * layers + 1  # and the pooler
    assert calls["embedding"] == 1
    # once for all layers: the mask into lanes, the results out of them
    assert calls["key_mask"] == calls["tokens_out"] == calls["first_token"] == 1
    assert calls["tokens_in"] == 0


def test_kernels_say_where_they_come_from(tiny):
    for kernel in tiny.built.kernels:
        generic = kernel["operation"] == "generic"
        assert kernel["provenance"] == ("generic" if generic else "default")
        assert kernel["calls"] >= 1
    names = [kernel["name"] for kernel in tiny.built.kernels]
    assert len(names) == len(set(names))


def test_params_are_what_the_function_wants(tiny, exported):
    graph = optimize(import_onnx(exported))
    row = rows.resolve(threads=1)
    lowered = lower(graph, row, lambda task: chooser_of(row).choose(task).knobs)
    names = [param.name for param in lowered.mod["main"].params]
    assert names[: len(exported.inputs) + 1] == [tensor.name for tensor in exported.inputs] + [
        "blocks"
    ]
    assert names[len(exported.inputs) + 1 :] == list(lowered.params) == list(tiny.built.params)


def loop_kinds(func) -> set[str]:
    kinds = set()
    tvm_ffi.structural_walk(
        func.body, (tirx.For, lambda loop: kinds.add(tirx.ForKind(loop.kind).name))
    )
    return kinds


def test_no_loop_nest_is_left_unscheduled(exported):
    graph, row = optimize(import_onnx(exported)), rows.resolve(threads=1)
    lowered = lower(graph, row, lambda task: chooser_of(row).choose(task).knobs)
    mod = builder.fuse_and_schedule(lowered.mod, rows.tvm_target(row))
    functions = {v.name_hint: f for v, f in mod.functions.items() if isinstance(f, tirx.PrimFunc)}
    assert len(functions) > 10
    for name, func in functions.items():
        kinds = loop_kinds(func)
        # the first tokens of a batch are a few microseconds, too little to share out
        if kinds and not name.startswith("first_token"):
            assert kinds & {"PARALLEL", "VECTORIZED"}, name


# Graphs that passes do not know, written as ONNX text around an embedding of 8 channels.


def program_of(body: str, directory, batch=None, length=None) -> Program:
    """Compile the frame with these nodes in it."""
    return Program(exported_of(body, directory, batch, length), directory / "lib.so", Smallest)


@pytest.mark.parametrize("body,names", UNMATCHED.values(), ids=UNMATCHED)
def test_graph_that_passes_do_not_match_is_right_and_named(tmp_path, body, names):
    program = program_of(body, tmp_path)
    fallen = {entry.split(" (")[0] for entry in program.built.fallthrough}
    assert names & fallen
    for lengths in ([3], [37, 37]):
        assert program.difference(request_of(program.exported, lengths)) < TOLERANCE


@pytest.mark.parametrize("body", MATCHED.values(), ids=MATCHED)
def test_graph_that_passes_match_is_right(tmp_path, body):
    program = program_of(body, tmp_path)
    assert not [
        operator for operator in program.built.fallthrough if operator.startswith(("matmul", "nn."))
    ]
    for lengths in ([3], [37, 20]):
        assert program.difference(request_of(program.exported, lengths)) < TOLERANCE


def test_static_axes_are_right(tmp_path):
    program = program_of(MATCHED["attention"], tmp_path, batch=2, length=20)
    assert program.calls()["attention"] == 1
    assert program.difference(request_of(program.exported, [20, 7])) < TOLERANCE
