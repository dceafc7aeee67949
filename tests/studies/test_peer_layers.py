"""Layers: installed once, by themselves, and a peer without them is left out with the reason."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bertile.base.progress import Progress
from bertile.bench.engines import LeftOut
from bertile.studies import peer_layers


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The lines that would be run; each leaves a file where it installs."""
    ran: list[list[str]] = []

    def run(line: list[str], **options: object) -> SimpleNamespace:
        ran.append(line)
        (Path(line[line.index("--target") + 1]) / "package").touch()
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    return ran


def test_a_layer_is_installed_once_without_dependencies(lines, tmp_path: Path) -> None:
    first = peer_layers.layer("fastembed", str(tmp_path), Progress(-1))
    again = peer_layers.layer("fastembed", str(tmp_path), Progress(-1))
    assert first == again and (first / "package").is_file() and len(lines) == 1
    assert "--no-deps" in lines[0] and set(peer_layers.PACKAGES["fastembed"]) <= set(lines[0])


def test_who_needs_no_layer_has_none(lines, tmp_path: Path) -> None:
    assert peer_layers.layer("st-torch", str(tmp_path), Progress(-1)) is None and not lines


def test_what_cannot_be_installed_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    failed = SimpleNamespace(returncode=1, stderr="looking\nERROR: no such package\n")
    monkeypatch.setattr(subprocess, "run", lambda *line, **options: failed)
    with pytest.raises(LeftOut, match=r"st-onnx is left out: .*: ERROR: no such package"):
        peer_layers.layer("st-onnx", str(tmp_path), Progress(-1))


def test_every_package_has_its_version() -> None:
    packages = [package for layer in peer_layers.PACKAGES.values() for package in layer]
    assert all(package.count("==") == 1 for package in packages)


HIDES = """
import importlib.util, sys
from importlib import metadata
from pathlib import Path
from bertile.studies import peer_layers

sys.path.insert(0, "elsewhere")
assert importlib.util.find_spec("datasets") and metadata.version("datasets") == "5.0"
peer_layers.enter(Path("layer"))
import of_the_layer, bertile
assert importlib.util.find_spec("datasets") is None
try:
    print(metadata.version("datasets"))
except metadata.PackageNotFoundError:
    print("hidden", metadata.version("numpy") != "")
"""


def test_a_layer_is_first_and_hides_what_wants_newer_packages(tmp_path: Path) -> None:
    for file, text in (
        ("layer/of_the_layer.py", ""),
        ("elsewhere/datasets/__init__.py", "raise ImportError('wants another hub')"),
        ("elsewhere/datasets-5.0.dist-info/METADATA", "Name: datasets\nVersion: 5.0\n"),
    ):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    line = [sys.executable, "-c", HIDES]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("hidden True\n", "")
