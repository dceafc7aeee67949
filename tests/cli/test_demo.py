"""The demo's own arithmetic and its text; `make demo` runs the whole of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from bertile import loader
from bertile.base.progress import Progress
from bertile.cli import demo
from bertile.config import Config


def test_neighbours_leave_the_sentence_itself_out() -> None:
    cosine = [[1.0, 0.2, 0.9], [0.2, 1.0, 0.4], [0.9, 0.4, 1.0]]
    nearest = demo.neighbours(["a", "b", "c"], cosine)
    assert [(entry["text"], entry["nearest"]) for entry in nearest] == [
        ("a", "c"),
        ("b", "c"),
        ("c", "a"),
    ]
    assert nearest[0]["cosine"] == 0.9


def test_sizes_count_the_runtime_once(tmp_path: Path, monkeypatch) -> None:
    for name, count in (("lib.so", 10), ("runtime/libtvm_ffi.so", 5), ("model.onnx", 7)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * count)
    library = str(tmp_path / "runtime" / "libtvm_ffi.so")
    monkeypatch.setattr(loader, "find_runtime", lambda: (library,))
    sizes = demo._sizes(tmp_path, tmp_path / "model.onnx")
    assert sizes["bertile"] == {"model": 17, "runtime": 5}
    assert sizes["onnxruntime"]["model"] == 7


def test_text_ends_with_a_table_of_latency_and_size() -> None:
    engines = {"bertile": "Bertile", "onnxruntime": "ONNX Runtime 1.31.1"}
    rows = [
        {"engine": name, "length": length, "median_ms": 1.5}
        for length in demo.LENGTHS
        for name in engines
    ]
    result = {
        "compile": {"max_abs_difference": 1e-6, "output": "out/minilm"},
        "neighbours": [{"text": "a", "nearest": "b", "cosine": 0.9}],
        "bench": {"versions": engines, "rows": rows, "threads": 2},
        "bytes": {name: {"model": 91_500_000, "runtime": 6_000_000} for name in engines},
    }
    text = demo.as_text(result)
    assert "ms, 128 tokens" in text and "ONNX Runtime 1.31.1" in text and "91.5 MB" in text


@pytest.mark.slow
def test_demo_runs_end_to_end_on_the_real_model(tmp_path):
    config = Config(cache_dir=str(tmp_path / "cache"))
    result = demo.demo(tmp_path / "out", config, Progress(verbosity=-1))
    text = demo.as_text(result)
    assert "ONNX Runtime" in text and "Someone makes music outdoors." in text
    assert all(sizes["runtime"] > 0 for sizes in result["bytes"].values())
