"""The small wheel of TVM's two libraries: what is in it, and that a bundle loads with it."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import platform
import zipfile
from importlib.util import find_spec

import pytest
from helpers import wheels

from bertile import loader
from bertile.base.errors import BertileError, PlatformError
from bertile.bundle import runtime_wheel
from bertile.loading import runtime

# What the header of an ELF library says of its machine.
HEADERS = {
    arch: b"\x7fELF" + bytes(14) + number.to_bytes(2, "little")
    for arch, number in (("x86_64", 62), ("aarch64", 183))
}


def libraries(arch: str) -> dict[str, bytes]:
    return {name: HEADERS[arch] + name.encode() for name in loader.RUNTIME}


@pytest.mark.parametrize("arch", HEADERS)
def test_wheel_holds_the_libraries_with_all_licences(tmp_path, arch):
    theirs = wheels.tvm_wheels(tmp_path / "tvm", libraries(arch))
    path = runtime_wheel.write(theirs, arch, tmp_path / "dist")
    assert path.name == f"bertile_runtime-0.27.0.post1-py3-none-manylinux_2_28_{arch}.whl"
    with zipfile.ZipFile(path) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    for name, data in libraries(arch).items():
        assert held[f"bertile_runtime/lib/{name}"] == data
    texts = {data.decode() for name, data in held.items() if "/licenses/" in name}
    wanted = {f"the text of {name}" for names in wheels.LICENCES.values() for name in names}
    assert texts == wanted
    (about,) = (data.decode() for name, data in held.items() if name.endswith("METADATA"))
    listed = {line.split(": ")[1] for line in about.splitlines() if line.startswith("License-F")}
    assert listed == {name.rpartition("/")[2] for name in held if "/licenses/" in name}
    (record,) = (data.decode() for name, data in held.items() if name.endswith("RECORD"))
    for name, digest, size in csv.reader(io.StringIO(record)):
        if not name.endswith("RECORD"):
            ours = base64.urlsafe_b64encode(hashlib.sha256(held[name]).digest()).rstrip(b"=")
            assert (digest, int(size)) == (f"sha256={ours.decode()}", len(held[name]))
    assert len(record.splitlines()) == len(held)


def test_the_same_wheels_give_the_same_bytes(tmp_path):
    theirs = wheels.tvm_wheels(tmp_path / "tvm", libraries("x86_64"))
    first, second = (runtime_wheel.write(theirs, "x86_64", tmp_path / name) for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_what_is_missing_or_of_another_machine_is_refused(tmp_path):
    theirs = wheels.tvm_wheels(tmp_path / "other", libraries("aarch64"))
    with pytest.raises(PlatformError, match="is for aarch64, not for x86_64"):
        runtime_wheel.write(theirs, "x86_64", tmp_path / "dist")
    with pytest.raises(BertileError, match=r"no wheel apache_tvm_ffi-\*\.whl"):
        runtime_wheel.write(theirs[:1], "aarch64", tmp_path / "dist")
    theirs = wheels.tvm_wheels(tmp_path / "bare", libraries("aarch64"), ["tvm/NOTICE"])
    with pytest.raises(BertileError, match="has no tvm/NOTICE"):
        runtime_wheel.write(theirs, "aarch64", tmp_path / "dist")


def test_loader_finds_the_libraries_of_the_wheel(tmp_path, monkeypatch):
    arch = platform.machine()
    theirs = wheels.tvm_wheels(tmp_path / "tvm", libraries(arch))
    with zipfile.ZipFile(runtime_wheel.write(theirs, arch, tmp_path / "dist")) as archive:
        archive.extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(runtime, "_mapped_libraries", dict)
    ours = tuple(str(tmp_path / "site" / "bertile_runtime" / "lib" / n) for n in loader.RUNTIME)
    assert loader.find_runtime() != ours  # TVM's own come first, since it would load them again
    only = lambda name: find_spec(name) if name == "bertile_runtime" else None  # noqa: E731
    monkeypatch.setattr(runtime, "find_spec", only)
    assert loader.find_runtime() == ours
