"""A bundle is written whole or not at all, and its files can be read without the tool."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from bertile import loader
from bertile.base import directories
from bertile.base.errors import BertileError, BundleError, UsageError
from bertile.bundle import safetensors as weights
from bertile.bundle import writer

safetensors = pytest.importorskip("safetensors.numpy")

MANIFEST = {
    "bertile": "0.1.0",
    "entry": "main",
    "model": {"source": "tiny", "max_length": 64},
    "target": {"name": "native", "arch": "x86_64", "features": []},
    "lanes": 16,
    "inputs": [{"name": "input_ids", "dtype": "int64", "below": 50, "default": None}],
    "outputs": [{"name": "logits", "dtype": "float32", "axes": ["batch", 2]}],
    "static": {"batch": None, "length": None},
}
PARAMS = {
    "odd": np.arange(3, dtype=np.float32),
    "even": np.arange(64, dtype=np.float32).reshape(4, 16),
    "scalar": np.array(2.5, dtype=np.float32),
    "bytes": np.arange(7, dtype=np.int8),
    "empty": np.zeros((0, 4), np.float32),
}


@pytest.fixture
def parts(tmp_path):
    """A stand-in for the library, and one tokenizer file."""
    library, tokenizer = tmp_path / "built.so", tmp_path / "tokenizer.json"
    library.write_bytes(b"\x7fELF" + bytes(1000))
    tokenizer.write_text("{}")
    return library, tokenizer


def write(parts, output, params=PARAMS, **manifest):
    library, tokenizer = parts
    return writer.write({**MANIFEST, **manifest}, library, params, [tokenizer], output)


def content(directory):
    return {p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def leftovers(directory):
    return sorted(path.name for path in directory.iterdir())


# -- write


def test_write_gives_the_files_of_the_contract(parts, tmp_path):
    output = write(parts, tmp_path / "out")
    assert leftovers(output) == ["lib.so", "manifest.json", "params.safetensors", "tokenizer.json"]


def test_write_records_size_and_hash_of_every_file(parts, tmp_path):
    output = write(parts, tmp_path / "out")
    files = json.loads((output / "manifest.json").read_text())["files"]
    assert set(files) == {"lib.so", "params.safetensors", "tokenizer.json"}
    for name, entry in files.items():
        data = (output / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def test_write_fills_in_schema_and_params_in_order(parts, tmp_path):
    manifest = writer.read_manifest(write(parts, tmp_path / "out"))
    assert manifest["schema"] == loader.SCHEMA
    assert manifest["params"] == list(PARAMS)


def test_write_makes_missing_parents(parts, tmp_path):
    assert write(parts, tmp_path / "a" / "b").is_dir()


def test_write_obeys_the_umask(parts, tmp_path):
    old = os.umask(0o027)
    try:
        assert write(parts, tmp_path / "out").stat().st_mode & 0o777 == 0o750
    finally:
        os.umask(old)


def test_write_replaces_an_older_bundle(parts, tmp_path):
    (write(parts, tmp_path / "out") / "notes.txt").write_text("somebody's")
    writer.write({**MANIFEST, "entry": "other"}, parts[0], PARAMS, [], tmp_path / "out")
    assert writer.read_manifest(tmp_path / "out")["entry"] == "other"
    assert (tmp_path / "out" / "notes.txt").read_text() == "somebody's"
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert leftovers(tmp_path) == ["built.so", "out", "tokenizer.json"]


def test_write_replaces_an_older_bundle_when_the_system_cannot_exchange(
    parts, tmp_path, monkeypatch
):
    write(parts, tmp_path / "out")
    monkeypatch.setattr(directories, "_exchange", lambda first, second: False)
    write(parts, tmp_path / "out", entry="other")
    assert writer.read_manifest(tmp_path / "out")["entry"] == "other"
    assert leftovers(tmp_path) == ["built.so", "out", "tokenizer.json"]


def test_write_follows_a_link_to_an_older_bundle(parts, tmp_path):
    write(parts, tmp_path / "out")
    (tmp_path / "link").symlink_to("out")
    assert write(parts, tmp_path / "link", entry="other") == tmp_path / "out"
    assert (tmp_path / "link").is_symlink()
    assert writer.read_manifest(tmp_path / "link")["entry"] == "other"


def test_write_takes_an_empty_directory(parts, tmp_path):
    (tmp_path / "out").mkdir()
    assert writer.read_manifest(write(parts, tmp_path / "out"))["entry"] == "main"


@pytest.mark.parametrize(
    "foreign", ["notes.txt", "manifest.json"], ids=["other files", "another tool's manifest"]
)
def test_write_refuses_a_directory_that_is_no_bundle(parts, tmp_path, foreign):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / foreign).write_text('{"name": "a web page"}')
    before = content(tmp_path)
    with pytest.raises(UsageError, match="was not made by Bertile"):
        write(parts, tmp_path / "out")
    assert content(tmp_path) == before


def test_write_refuses_a_file(parts, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UsageError, match="is not a directory"):
        write(parts, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_write_names_the_path_when_it_lies_under_a_file(parts, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BertileError, match="file/out"):
        write(parts, tmp_path / "file" / "out")
    assert leftovers(tmp_path) == ["built.so", "file", "tokenizer.json"]


FAILING = {
    "library": (writer.shutil, "copyfile"),
    "weights": (weights, "_layout"),
    "manifest": (writer, "_describe"),
    "sync": (directories, "_sync"),
    "rename": (directories, "_rename"),
}


@pytest.mark.parametrize("older", [False, True], ids=["new", "over an older bundle"])
@pytest.mark.parametrize("step", FAILING)
def test_write_leaves_everything_as_it_was_when_a_step_fails(
    parts, tmp_path, monkeypatch, step, older
):
    output = tmp_path / "deep" / "out"
    if older:
        write(parts, output)
    before = content(tmp_path)

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    module, name = FAILING[step]
    monkeypatch.setattr(module, name, full)
    with pytest.raises(BertileError, match=r"deep/out: No space left on device; free"):
        write(parts, output, entry="other")
    assert content(tmp_path) == before
    assert (tmp_path / "deep").exists() == older


def test_write_leaves_nothing_behind_when_interrupted(parts, tmp_path, monkeypatch):
    def interrupt(directory):
        raise KeyboardInterrupt

    monkeypatch.setattr(directories, "_sync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(parts, tmp_path / "out")
    assert leftovers(tmp_path) == ["built.so", "tokenizer.json"]


def test_write_leaves_nothing_behind_when_the_disk_takes_no_more(parts, tmp_path):
    script = f"""
import resource, signal, sys
import numpy as np
from pathlib import Path
from bertile.bundle import writer
from bertile.base import directories
from bertile.base.errors import BertileError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # a file cannot grow beyond this
params = {{"big": np.zeros(100_000, np.float32)}}
try:
    writer.write({MANIFEST!r}, Path({str(parts[0])!r}), params, [], {str(tmp_path / "out")!r})
except BertileError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "params.safetensors: File too large" in run.stdout, run.stderr
    assert leftovers(tmp_path) == ["built.so", "tokenizer.json"]


def test_write_names_the_path_when_it_is_not_writable(parts, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(BertileError, match="locked/out: Permission denied"):
        write(parts, tmp_path / "locked" / "out")


# -- include_runtime


def test_include_runtime_copies_libraries_licence_and_loader(parts, tmp_path):
    library, _ = parts
    output = writer.write(
        MANIFEST, library, PARAMS, [], tmp_path / "out", add=writer.include_runtime
    )
    names = {"runtime/libtvm_ffi.so", "runtime/libtvm_runtime.so", "runtime/LICENSE", "loader.py"}
    assert names <= set(writer.read_manifest(output)["files"])
    for name, path in zip(loader.RUNTIME, loader.find_runtime()):
        assert (output / "runtime" / name).stat().st_size == os.stat(path).st_size


def test_include_runtime_takes_the_parts_of_another_machine(tmp_path):
    libraries, native, output = (tmp_path / name for name in ("libraries", "native", "out"))
    for path in (*(libraries / name for name in loader.RUNTIME), libraries / "NOTICE"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{path.name} of aarch64")
    native.mkdir()
    (native / "libbertile.so").write_text("the library")
    (native / "bertile-run").write_text("the command")
    (native / "bertile-run").chmod(0o755)
    output.mkdir()
    writer.include_runtime(output, libraries, native)
    assert (output / "runtime" / "libtvm_runtime.so").read_text() == "libtvm_runtime.so of aarch64"
    assert (output / "runtime" / "libbertile.so").read_text() == "the library"
    assert (output / "runtime" / "NOTICE").is_file()
    assert os.access(output / "bertile-run", os.X_OK)
    assert not os.access(output / "runtime" / "libbertile.so", os.X_OK)
    copied = writer.copy(output, tmp_path / "copy")
    assert os.access(copied / "bertile-run", os.X_OK)


def test_include_runtime_brings_sources_and_a_pkg_config_file_that_finds_them(tmp_path):
    native, output = tmp_path / "native", tmp_path / "out"
    for path in (native / "libbertile.so", native / "bertile-run"):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    output.mkdir()
    writer.include_runtime(output, native=native)
    wanted = {"bertile.h", "bertile.hpp", "CMakeLists.txt", "example.c", "model.c", "command/run.c"}
    names = {path.relative_to(output / "native").as_posix() for path in output.rglob("native/**/*")}
    assert wanted <= names
    text = (output / "native" / "bertile.pc").read_text()
    assert "libdir=${prefix}/runtime\nincludedir=${prefix}/native\n" in text
    assert "@" not in text


# -- read_manifest


def test_read_manifest_refuses_a_directory_without_one(tmp_path):
    with pytest.raises(BundleError, match="is not a bundle"):
        writer.read_manifest(tmp_path)


# -- weights


def test_weights_are_read_by_safetensors(tmp_path):
    path = weights.write(tmp_path / "w.safetensors", PARAMS)
    stored = safetensors.load_file(path)
    for name, tensor in PARAMS.items():
        assert stored[name].dtype == tensor.dtype and stored[name].shape == tensor.shape
        np.testing.assert_array_equal(stored[name], tensor)
    assert all(name in PARAMS or name.startswith("padding.") for name in stored)


def test_weights_start_on_multiples_of_64_bytes(tmp_path):
    path = weights.write(tmp_path / "w.safetensors", PARAMS)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + size])
    assert all(
        (8 + size + entry["data_offsets"][0]) % 64 == 0
        for entry in (entries[name] for name in PARAMS)
    )


def test_weights_keep_what_is_not_contiguous(tmp_path):
    tensor = np.arange(12, dtype=np.int32).reshape(3, 4).T[::2]
    stored = safetensors.load_file(weights.write(tmp_path / "w.safetensors", {"t": tensor}))
    np.testing.assert_array_equal(stored["t"], tensor)


def test_weights_keep_a_tensor_named_like_padding(tmp_path):
    tensors = {"odd": np.ones(1, np.float32), "padding.4": np.ones(5, np.float32)}
    stored = safetensors.load_file(weights.write(tmp_path / "w.safetensors", tensors))
    np.testing.assert_array_equal(stored["padding.4"], tensors["padding.4"])


def test_weights_refuse_a_dtype_without_a_name(tmp_path):
    with pytest.raises(BertileError, match="the tensor z has dtype complex64"):
        weights.write(tmp_path / "w.safetensors", {"z": np.zeros(2, np.complex64)})


def test_weights_leave_the_older_file_when_writing_fails(tmp_path, monkeypatch):
    path = weights.write(tmp_path / "w.safetensors", PARAMS)
    before = path.read_bytes()

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights.os, "fsync", full)
    with pytest.raises(BertileError, match=r"w\.safetensors: No space left"):
        weights.write(path, {"other": np.zeros(3, np.float32)})
    assert path.read_bytes() == before and leftovers(tmp_path) == ["w.safetensors"]


def test_copied_bundle_is_the_same_bundle(parts, tmp_path):
    output = write(parts, tmp_path / "out")
    shutil.copytree(output, tmp_path / "copy")
    assert writer.read_manifest(tmp_path / "copy") == writer.read_manifest(output)
