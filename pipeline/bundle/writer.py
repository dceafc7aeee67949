"""Writes a bundle directory: whole, or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from bertile.base.directories import copy_file, copy_files, making
from bertile.bundle import native_build, one_file, runtime_libraries, safetensors
from bertile.loader import LIBRARY, MANIFEST, SCHEMA, WEIGHTS, read_manifest

__all__ = ["copy", "include_runtime", "read_manifest", "write"]


def write(
    manifest: Mapping[str, object],
    library: Path | Mapping[str, Path],
    params: Mapping[str, np.ndarray],
    extra_files: Sequence[Path],
    output: str | os.PathLike,
    add: Callable[[Path], None] | None = None,
    check: Callable[[Path], Mapping[str, object]] | None = None,
) -> Path:
    """Write a bundle to `output` and return its path.

    `library` is the code: one library, or the files of a bundle for a GPU by their names.
    `manifest` gets its keys "schema", "params" and "files" here; `extra_files` (tokenizer,
    config.json) go to the top of the bundle under their own names; `add` puts further files into
    it, as `include_runtime` does. Everything is written beside `output` and put there at the end,
    as ``directories.making`` does: an older bundle is replaced, what else lies there stays.
    `check` runs on the bundle before it gets its name: what it returns is the manifest's "check",
    and when it raises, nothing is written.
    """
    with making(output, MANIFEST) as directory:
        parts = library if isinstance(library, Mapping) else {LIBRARY: library}
        for name, path in parts.items():
            shutil.copyfile(path, directory / name)
        safetensors.write(directory / WEIGHTS, params)
        for path in extra_files:
            shutil.copyfile(path, directory / path.name)
        if add is not None:
            add(directory)
        complete = {"schema": SCHEMA, **manifest, "params": list(params)}
        complete["files"] = _describe(directory)
        _write_manifest(directory, complete)
        if check is not None:
            _write_manifest(directory, {**complete, "check": check(directory)})
    return Path(os.path.realpath(output))


def copy(source: Path, output: str | os.PathLike, marker: str = MANIFEST) -> Path:
    """Copy the directory `source` to `output` as `write` would have put it there; see `making`."""
    with making(output, marker) as directory:
        copy_files(source, directory)
    return Path(os.path.realpath(output))


def _write_manifest(directory: Path, manifest: Mapping[str, object]) -> None:
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")


def include_runtime(
    directory: Path, libraries: Path | None = None, native: Path | None = None
) -> None:
    """Copy what runs a bundle on a machine without Bertile into it.

    The two TVM runtime libraries with their licence, out of `libraries` (default: those installed
    here), and loader.py; with `native`, what `native_loader.build` has made, and its sources.
    """
    folder = directory / "runtime"
    folder.mkdir()
    if libraries is None:
        runtime_libraries.copy_installed(folder)
    else:
        copy_files(libraries, folder)
    _write_loader(directory)
    if native is not None:
        shutil.copyfile(native / native_build.LIBRARY, folder / native_build.LIBRARY)
        copy_file(native / native_build.COMMAND, directory / native_build.COMMAND)
        native_build.copy_sources(directory / "native")


def include_loaders(directory: Path) -> None:
    """Write what loads a bundle for a GPU, which needs Python, numpy and the driver, into it."""
    _write_loader(directory)
    (directory / "cuda_loader.py").write_bytes(one_file.cuda_loader().encode())


def _write_loader(directory: Path) -> None:
    (directory / "loader.py").write_bytes(one_file.loader().encode())


def _describe(directory: Path) -> dict[str, dict]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {
        path.relative_to(directory).as_posix(): {
            "sha256": _sha256(path),
            "bytes": path.stat().st_size,
        }
        for path in files
    }


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
