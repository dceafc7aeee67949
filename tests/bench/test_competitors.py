"""Which engines a benchmark has: names, precisions, other bundles, and who is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bertile import loader
from bertile.base.errors import BundleError, MissingExtraError, ModelError, UsageError
from bertile.base.progress import Progress
from bertile.bench import competitors
from bertile.bench.engines import LeftOut

MANIFEST: dict[str, Any] = {
    "model": {
        "source": "minilm",
        "sha256": "old",
        "family": "bert",
        "head": "embedding",
        "max_length": 32,
    },
    "static": {"batch": None, "length": None},
    "config": {},
    "outputs": [{"name": "y"}],
    "inputs": [{"name": "input_ids", "dtype": "int64", "below": 10, "default": None}],
}


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Nothing is exported or quantized; the list tells what would have been."""
    asked: list[tuple] = []

    def read(directory: Path) -> dict[str, Any]:
        return json.loads((directory / loader.MANIFEST).read_text(encoding="utf-8"))

    def prepared(kind: str, precision: str, onnx: Path, *_: Any) -> Path:
        asked.append((kind, precision, onnx))
        return Path(f"{kind}-{precision}.onnx")

    monkeypatch.setattr(competitors.loader, "read_manifest", read)
    monkeypatch.setattr(competitors.peer_models, "prepared", prepared)
    monkeypatch.setattr(competitors.deepsparse, "environment", lambda *_: Path("python"))
    return asked


def find(against: list[str], manifest: dict[str, Any] = MANIFEST) -> tuple[list, list[str]]:
    arguments = (Path("out"), manifest, against, Path("model.onnx"), None, Progress(-1))
    return competitors.engines(*arguments)


def bundle(directory: Path, **changes: Any) -> str:
    directory.mkdir()
    text = json.dumps({**MANIFEST, **changes})
    (directory / loader.MANIFEST).write_text(text, encoding="utf-8")
    return str(directory)


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("openvino", "fp32", ("openvino", "openvino", "fp32")),
        ("openvino", "int8", ("openvino", "openvino", "int8")),
        ("openvino:int8", "int8", ("openvino", "openvino", "int8")),
        ("openvino:bf16", "int8", ("openvino:bf16", "openvino", "bf16")),
        ("torch", "fp16", ("torch", "torch", "fp32")),
    ],
)
def test_peer_has_the_bundles_precision_unless_told(
    name: str, precision: str, expected: tuple[str, str, str]
) -> None:
    assert competitors.parse(name, precision) == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("onnxruntim", "did you mean 'onnxruntime'?"),
        ("openvino:int3", "precision 'int3' of 'openvino:int3' is unknown"),
        ("no/such/directory", "or give the directory of another bundle"),
    ],
)
def test_unknown_peers_are_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        competitors.parse(name, "fp32")
    assert message in str(caught.value)


def test_each_peer_gets_its_form_of_the_model(exports: list[tuple]) -> None:
    manifest = {**MANIFEST, "config": {"precision": "int8"}}
    engines, notes = find(["onnxruntime", "openvino:bf16", "openvino:bf16", "none"], manifest)
    assert [(engine.name, engine.precision) for engine in engines] == [
        ("bertile", "int8"),
        ("onnxruntime", "int8"),
        ("openvino:bf16", "bf16"),
    ]
    onnx = Path("model.onnx")
    assert exports == [("onnxruntime", "int8", onnx), ("openvino", "bf16", onnx)]
    assert engines[1].source.onnx == Path("onnxruntime-int8.onnx") and notes == []
    assert engines[0].source.onnx == Path("model.onnx")


def test_another_bundle_is_a_peer_by_its_path(exports: list[tuple], tmp_path: Path) -> None:
    other = bundle(tmp_path / "other", config={"precision": "int8"})
    engines, _ = find([other])
    assert [(engine.name, engine.kind, engine.precision) for engine in engines] == [
        ("bertile", "bertile", "fp32"),
        (other, "bertile", "int8"),
    ]
    assert engines[1].source.bundle == Path(other) and exports == []


def test_bundle_of_another_model_is_refused(exports: list[tuple], tmp_path: Path) -> None:
    other = bundle(tmp_path / "other", outputs=[{"name": "logits"}])
    with pytest.raises(UsageError, match="has the outputs logits, out has y; compare two bundles"):
        find([other])


def test_precision_that_a_peer_lacks_is_a_note(exports: list[tuple]) -> None:
    engines, notes = find(["onnxruntime:bf16", "onnxruntime"])
    assert [engine.name for engine in engines] == ["bertile", "onnxruntime"]
    assert notes == [
        "onnxruntime:bf16 is left out: it computes in fp32, int8, int4 on a CPU, not in bf16"
    ]


def test_what_runs_checkpoints_is_left_out_with_a_sentence_for_a_foreign_onnx_file() -> None:
    manifest = {**MANIFEST, "model": {"source": "my.onnx"}}
    names = ("onnxruntime", *competitors.CHECKPOINTS)
    wanted = [competitors.parse(name, "fp32") for name in names]
    kept, notes = competitors.possible(wanted, manifest)
    assert kept == wanted[:1] and [note.split()[0] for note in notes] == list(names[1:])
    assert all("my.onnx is an ONNX file" in note for note in notes)
    assert competitors.possible(wanted, MANIFEST) == (wanted, [])


def test_peer_that_cannot_take_the_model_is_a_note(
    exports: list[tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ModelError("the model cannot be written in ONNX opset 17")

    def bare(*_: Any) -> None:
        raise MissingExtraError("this step needs the package gguf")

    def absent(*_: Any) -> None:
        raise LeftOut("deepsparse is left out: it needs Python 3.11, which is not installed")

    monkeypatch.setattr(competitors.peer_models, "prepared", fail)
    engines, notes = find(["openvino"])
    assert len(engines) == 1 and notes[0].startswith("openvino is left out: the model cannot")
    monkeypatch.setattr(competitors.peer_models, "prepared", bare)
    assert find(["onnxruntime"])[1] == ["onnxruntime is left out: this step needs the package gguf"]
    monkeypatch.setattr(competitors.deepsparse, "environment", absent)
    assert "it needs Python 3.11" in find(["deepsparse"])[1][0]


def test_model_that_changed_since_it_was_compiled_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bertile.export.files.fingerprint", lambda *_: "new")
    with pytest.raises(BundleError, match="'minilm' has changed since out was compiled"):
        competitors.source(Path("out"), MANIFEST, ["torch"], None, None)
