"""The bench that travels to a GPU: its cases, turns and table, here on a CPU; what its package
weighs.
"""

from __future__ import annotations

import json
import lzma

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from bertile.studies import cuda_bench, cuda_package  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bench") / "model"
    cuda_package.model("bert-tiny", directory)
    return directory


class StandIn:
    """A bundle whose answers are nearly the model's, and whose times are known."""

    def __init__(self, name, directory):
        self.name = name
        self._peer = cuda_bench.Peer("peer", directory, "cpu", "float32", False)

    def output(self, arrays):
        return self._peer.output(arrays) * np.float32(1.001)

    def milliseconds(self, arrays, calls):
        return [0.5] * calls

    def waited(self, arrays, device, calls):
        return [] if "attention_mask" in arrays else [0.75] * calls


def test_rows_and_table_of_a_run_on_this_processor(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cuda_bench, "Bundle", StandIn)
    chosen = ("batch 1", "batch 32, lengths 8-128")
    small = {"batch 32, lengths 8-128": cuda_bench.Case(chosen[1], 4, ragged=True, limit=0.6)}
    cases = tuple(small.get(case.name, case) for case in cuda_bench.CASES)
    monkeypatch.setattr(cuda_bench, "CASES", cases)
    output = tmp_path / "result.json"
    arguments = ["--fp16", str(model), "--model", str(model), "--device", "cpu", "--no-compile"]
    cuda_bench.main(
        [*arguments, "--rounds", "2", "--calls", "2", "--cases", *chosen, "-o", str(output)]
    )
    rows = json.loads(output.read_text())["rows"]
    assert [row["case"] for row in rows] == [chosen[0]] * 2 + [chosen[1]] * 2
    for ours, peer in (rows[:2], rows[2:]):
        assert ours["median_ms"] == 0.5 and peer["median_ms"] > 0
        assert ours["of_best_peer"] == pytest.approx(0.5 / peer["median_ms"])
        assert ours["cosine"] == pytest.approx(1.0) and ours["max_abs_difference"] > 0
        assert peer["max_abs_difference"] == 0  # on a CPU the peer is the reference
    assert rows[0]["lengths"] == [128] and rows[0]["call_ms"] == 0.75
    assert sorted(rows[2]["lengths"]) == [8, 48, 88, 128]
    assert rows[2]["call_ms"] is None and rows[2]["limit"] == 0.6
    page = tmp_path / "RESULTS.md"
    page.write_text("<!-- bench-cuda -->\n<!-- /bench-cuda -->\n")
    cuda_package.main(["--table", str(output), "--into", str(page)])
    table = page.read_text()
    assert "| batch 1 " in table and "| Bertile fp16 " in table and "torch" in table


def test_cases_are_those_of_the_issue():
    limits = {case.name: (case.batch, case.precision, case.limit) for case in cuda_bench.CASES}
    assert limits == {
        "batch 1": (1, "fp16", 0.7),
        "batch 8": (8, "fp16", 0.9),
        "batch 32": (32, "fp16", 1.0),
        "batch 32, lengths 8-128": (32, "fp16", 0.6),
        "batch 32, int8": (32, "int8", 0.8),
    }
    ragged = next(case for case in cuda_bench.CASES if case.ragged)
    lengths = cuda_bench.inputs(ragged, 1000)["attention_mask"].sum(1)
    assert lengths.min() == 8 and lengths.max() == 128 and len(set(lengths)) == 32


def test_flops_are_those_of_the_layers():
    """BERT-base on 128 tokens: 2 x 85 million weights a token, and attention."""
    config = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
    dense = 2 * 128 * 12 * (4 * 768 * 768 + 2 * 768 * 3072)
    attention = 12 * 2 * 2 * 128 * 128 * 768
    assert cuda_package.flops(config, [128]) == dense + attention
    assert cuda_package.flops(config, [128, 64]) < 2 * cuda_package.flops(config, [128])


def test_model_is_random_and_yet_small_to_send(model):
    """All layers are alike and no two of their weights; the compressor keeps one of each."""
    from safetensors.numpy import load_file

    tensors = load_file(model / "model.safetensors")
    first, last = (tensors[f"encoder.layer.{n}.output.dense.weight"] for n in (0, 1))
    assert first.dtype == np.float16 and (first == last).all() and len(np.unique(first)) > 5000
    data = (model / "model.safetensors").read_bytes()
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 1, "dict_size": 1 << 24}]
    assert len(lzma.compress(data, lzma.FORMAT_XZ, filters=filters)) < 0.75 * len(data)
