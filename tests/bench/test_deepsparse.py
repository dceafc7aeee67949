"""DeepSparse in another Python: the messages, one compile per size, and what goes wrong."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bertile.bench import deepsparse, deepsparse_server
from bertile.bench.engines import Engine, LeftOut, Source

# In place of the package: adds the inputs, and writes into the model file as the package does.
STAND_IN = """
import runpy, sys, types

class Engine:
    def __init__(self, model, batch_size, num_cores, input_shapes):
        if "broken" in open(model).read():
            raise RuntimeError("unsupported model")
        open(model, "w").write("changed")
        self.input_names, self.shape, self.cores = ["a", "b"], tuple(input_shapes[0]), num_cores
    def run(self, inputs):
        assert inputs[0].shape == self.shape
        print("noise")
        return [inputs[0] + 10 * inputs[1], inputs[0] * self.cores]

sys.modules["deepsparse"] = types.SimpleNamespace(Engine=Engine, __version__="0.0")
sys.argv[0] = {server!r}
runpy.run_path({server!r}, run_name="__main__")
"""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A DeepSparse over the stand-in, in this very Python."""
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN.format(server=deepsparse_server.__file__), encoding="utf-8")
    monkeypatch.setattr(deepsparse_server, "__file__", str(script))
    (tmp_path / "model.onnx").write_text("model", encoding="utf-8")
    source = Source(tmp_path, tmp_path / "model.onnx")
    peer = deepsparse.DeepSparse(
        Engine("deepsparse:int8", "deepsparse", "int8", source), 2, Path(sys.executable)
    )
    yield peer
    peer.close()


def inputs(*shape: int) -> dict[str, np.ndarray]:
    # in another order than the engine asks for them
    return {"b": np.full(shape, 2, np.int64), "a": np.ones(shape, np.int64)}


def test_message_comes_back_as_it_was_written() -> None:
    stream = io.BytesIO()
    deepsparse_server.write(stream, {"count": 3}, inputs(2, 3))
    deepsparse_server.write(stream, {"kind": "times", "value": [1.5]})
    stream.seek(0)
    header, arrays = deepsparse_server.read(stream)
    assert header["count"] == 3 and arrays["b"].tolist() == [[2, 2, 2]] * 2
    assert deepsparse_server.read(stream)[0]["value"] == [1.5]
    with pytest.raises(EOFError):
        deepsparse_server.read(stream)


def test_every_size_is_compiled_from_a_file_of_its_own(worker, tmp_path: Path) -> None:
    assert worker.receive() == "DeepSparse 0.0"
    for shape in ((1, 4), (2, 3), (1, 4)):
        first, second = worker.outputs(inputs(*shape))
        assert first.tolist() == np.full(shape, 21).tolist() and (second == 2).all()
    times = worker.call(inputs(1, 4), 5)
    assert len(times) == 5 and all(time > 0 for time in times)
    assert (tmp_path / "model.onnx").read_text() == "model"


def test_model_that_it_cannot_run_is_left_out(worker, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("broken", encoding="utf-8")
    worker.receive()
    with pytest.raises(LeftOut, match="deepsparse:int8 is left out: RuntimeError: unsupported"):
        worker.outputs(inputs(1, 4))


def test_process_that_dies_is_left_out(worker) -> None:
    worker.receive()
    worker._process.kill()
    worker._process.wait()
    with pytest.raises(LeftOut, match="its process ended with code -9"):
        worker.outputs(inputs(1, 4))


def test_environment_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = []

    def run(line: tuple, **_: object) -> SimpleNamespace:
        lines.append(line)
        if "venv" in line:
            python = Path(line[-1]) / "bin" / "python"
            python.parent.mkdir(parents=True)
            python.touch()
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(deepsparse, "_base_python", lambda: "python3.11")
    python = deepsparse.environment(str(tmp_path))
    assert python.exists() and deepsparse.environment(str(tmp_path)) == python
    assert len(lines) == 2 and "deepsparse==1.8.0" in lines[1]
    assert [path.name for path in tmp_path.iterdir()] == ["deepsparse-1.8.0"]


def test_environment_that_cannot_be_made_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = SimpleNamespace(returncode=1, stderr="a stack\nno such package\n", stdout="")
    monkeypatch.setattr(subprocess, "run", lambda line, **_: failed)
    monkeypatch.setattr(deepsparse, "_base_python", lambda: "python3.11")
    with pytest.raises(LeftOut, match="it cannot be installed: no such package"):
        deepsparse.environment(str(tmp_path))
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    monkeypatch.setattr(deepsparse, "PYTHON", (2, 0))
    with pytest.raises(LeftOut, match=r"it needs Python 2\.0, which is not installed"):
        deepsparse.environment(str(tmp_path))
