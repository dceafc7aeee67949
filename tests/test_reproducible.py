"""One model compiled twice gives the same bytes, in whatever process, cache and directory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bertile.base.fingerprint import hash_path
from bertile.bundle import native_build, safetensors
from bertile.codegen import llvm
from bertile.config import Config
from bertile.export.cached import export_cached
from bertile.run import qemu
from bertile.targets.rows import native, resolve

MODEL = "synthetic:bert-tiny"
CASES = {
    "here": ("--no-runtime",),
    "with the runtime": ("--precision", "int8"),
    "for ARM": ("--target", "arm-a76"),
    "for ARM in int8": ("--target", "arm-v1", "--precision", "int8", "--no-runtime"),
    "for a GPU": ("--target", "cuda-sm80", "--precision", "fp16"),
}


def contents(directory: Path) -> dict[str, str]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): hash_path(path) for path in files}


def compile_apart(place: Path, exported: Path, seed: int, *arguments: str) -> dict[str, str]:
    """Compile in a process of its own, with a cache that knows the export alone."""
    place.mkdir()
    shutil.copytree(exported.parent, place / "cache" / exported.parent.name)
    line = [sys.executable, "-m", "bertile", "-q", "compile", MODEL, "-o", "out", *arguments]
    environment = {**os.environ, "PYTHONHASHSEED": str(seed), "TMPDIR": str(place)}
    done = subprocess.run(
        [*line, "--cache-dir", "cache"], cwd=place, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return contents(place / "out")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_compiles_give_the_same_files(tmp_path, exported, case):
    if "--target" in CASES[case]:
        row = resolve(CASES[case][1])
        if row.gpu is None and (reason := qemu.missing(row)):
            pytest.skip(reason)
    short, long = tmp_path / "a", tmp_path / "another_directory"
    first = compile_apart(short, exported.directory, 1, *CASES[case])
    second = compile_apart(long, exported.directory, 2, *CASES[case])
    assert len(first) >= 4 and first == second


@pytest.mark.slow
def test_two_exports_give_the_same_files(tmp_path):
    for name in ("a", "b"):
        export_cached(MODEL, Config(cache_dir=str(tmp_path / name)))
    files = [contents(next((tmp_path / name).glob("export.*/content"))) for name in ("a", "b")]
    assert len(files[0]) >= 2 and files[0] == files[1]


SOURCE = "int {}(int x) {{ return x + 1; }}\n"


@pytest.mark.parametrize("target", ["native", "arm-a76"])
def test_a_library_says_nothing_of_where_it_was_linked(tmp_path, target):
    row = native() if target == "native" else resolve(target)
    libraries = []
    for part in ("lib0", "devc"):
        (tmp_path / f"{part}.c").write_text(SOURCE.format(part))
        line = [*llvm.link_command(row), "-g0", "-c", f"{part}.c", "-o", f"{part}.o"]
        subprocess.run(line, cwd=tmp_path, check=True)
    for name in ("a", "a_longer_name"):
        place = tmp_path / name
        place.mkdir()
        objects = [shutil.copy(tmp_path / f"{part}.o", place) for part in ("lib0", "devc")]
        llvm.link(row, str(place / "lib.so"), objects)
        libraries.append((place / "lib.so").read_bytes())
    assert libraries[0] == libraries[1] and b"a_longer_name" not in libraries[1]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="this machine has no cc")
def test_the_c_loader_says_nothing_of_where_it_was_built(tmp_path, monkeypatch):
    sources = shutil.copytree(native_build.SOURCES, tmp_path / "other_sources")
    native_build.build(native(), tmp_path / "a", ("cc",))
    monkeypatch.setattr(native_build, "SOURCES", Path(sources))
    native_build.build(native(), tmp_path / "a_longer_name", ("cc",))
    first, second = contents(tmp_path / "a"), contents(tmp_path / "a_longer_name")
    assert set(first) == {native_build.COMMAND, native_build.LIBRARY} and first == second


def test_weights_are_written_in_their_order(tmp_path):
    params = {name: np.full(3, number, np.float32) for number, name in enumerate("zyx")}
    for name in ("a", "b"):
        safetensors.write(tmp_path / name, params)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
