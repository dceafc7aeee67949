"""What an index would serve, installed from the files, does what the README says."""

from __future__ import annotations

import platform
import sysconfig
from pathlib import Path

import pytest
from helpers import environments, tiny_encoder, wheels
from helpers.environments import typed

from bertile.bundle import runtime_wheel

tomllib = pytest.importorskip("tomllib")  # part of Python from 3.11 on
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
LARGEST = 150 * 10**6  # bytes of pip install 'bertile[run]'


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Path:
    """A directory of wheels: Bertile's, and that of its runtime."""
    place = tmp_path_factory.mktemp("served")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wheels.build(place, project["tool"]["setuptools"]["package-dir"].values())
    theirs = wheels.tvm_wheels(place / "tvm", wheels.installed_libraries())
    runtime_wheel.write(theirs, platform.machine(), place)
    return place


def test_compile_run_and_load_from_the_wheel(served, tmp_path):
    """Its dependencies are those of the tests; Bertile itself is the wheel's alone."""
    programs = environments.make(tmp_path / "venv")
    done = environments.pip(programs, "--no-index", "--no-deps", *served.glob("*.whl"))
    assert done.returncode == 0, done.stderr
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    tiny_encoder.save(tmp_path / "model")
    bertile = programs / "bertile"
    where = "import bertile; print(bertile.__file__)"
    assert str(packages) in typed(programs / "python", "-c", where, cwd=tmp_path)
    at = ("--cache-dir", tmp_path / "stages", "--log-dir", tmp_path / "log", "--tune", "none")
    typed(bertile, "compile", "model", "--head", "embedding", "-o", "out", *at, cwd=tmp_path)
    assert "movie" in typed(bertile, "run", "out", "good movie", "bad movie", cwd=tmp_path)
    assert "within" in typed(bertile, "verify", "out", cwd=tmp_path)
    typed(bertile, "inspect", "out", cwd=tmp_path)
    load = "import bertile; print(*bertile.load('out')(input_ids=[[2, 4, 3]]))"
    assert "sentence_embedding" in typed(programs / "python", "-c", load, cwd=tmp_path)


def test_run_extra_is_small_and_answers_texts(served, tmp_path, stages):
    """As a user installs it, without TVM; a bundle without a runtime finds that of the wheel."""
    programs = environments.make(tmp_path / "venv")
    before = size_of(tmp_path / "venv")
    (wheel,) = served.glob("bertile-*.whl")
    done = environments.pip(programs, "--find-links", served, f"{wheel}[run]")
    if "No matching distribution" in done.stderr:
        pytest.skip("no package index is reached")
    assert done.returncode == 0, done.stderr
    assert size_of(tmp_path / "venv") - before <= LARGEST
    tiny_encoder.compile(tmp_path / "out", stages, runtime="none")
    assert "movie" in typed(programs / "bertile", "run", "out", "good movie", cwd=tmp_path)


def size_of(directory: Path) -> int:
    return sum(file.lstat().st_size for file in directory.rglob("*") if file.is_file())
