"""Writes a bundle directory: whole, or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from bertile.base.errors import BertileError, UsageError
from bertile.bundle import native_build, one_file, runtime_libraries, safetensors
from bertile.loader import LIBRARY, MANIFEST, SCHEMA, WEIGHTS, read_manifest
from bertile.loading.manifest import SEAL, UNSEALED

__all__ = ["copy", "include_runtime", "making", "read_manifest", "write", "write_manifest"]


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
    `manifest` gets "schema", "params", "files" and its own hash here; `extra_files` (tokenizer,
    config.json) go to the top of the bundle under their own names; `add` puts further files into
    it, as `include_runtime` does. Everything is written beside `output` and renamed at the end. An
    older bundle there is replaced; any other directory that is not empty is refused with
    UsageError. `check` runs on the bundle before it gets its name: what it returns is the
    manifest's "check", and when it raises, nothing is written.
    """
    with making(output) as directory:
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
        write_manifest(directory, complete)
        if check is not None:
            write_manifest(directory, {**complete, "check": check(directory)})
    return Path(os.path.realpath(output))


def copy(source: Path, output: str | os.PathLike, marker: str = MANIFEST) -> Path:
    """Copy the directory `source` to `output` as `write` would have put it there; see `making`."""
    with making(output, marker) as directory:
        _copy_files(source, directory)
    return Path(os.path.realpath(output))


@contextlib.contextmanager
def making(output: str | os.PathLike, marker: str = MANIFEST) -> Iterator[Path]:
    """Give an empty directory to fill, which becomes `output` at the end; nothing if that raises.

    `marker` is the file by which an older result is known, which may be replaced.
    """
    target = Path(os.path.realpath(output))
    _check_target(target, marker)
    with _beside(target) as directory:
        yield directory
        _sync(directory)
        _rename(directory, target)


def _copy_files(source: Path, directory: Path) -> None:
    # not copytree: it goes on when the disk is full, and raises a list of every file that failed
    for path in sorted(source.rglob("*")):
        place = directory / path.relative_to(source)
        if path.is_dir():
            place.mkdir()
        else:
            _copy_file(path, place)


def _copy_file(source: Path, place: Path) -> None:
    """Copy the bytes, and whether it is a program."""
    shutil.copyfile(source, place)
    if os.access(source, os.X_OK):
        place.chmod(0o777 & ~_umask())


def write_manifest(directory: Path, manifest: Mapping[str, object]) -> None:
    """Write manifest.json, sealed: its last key is the hash of the file with zeros in that place.

    A loader can so check it without writing JSON itself.
    """
    kept = {key: value for key, value in manifest.items() if key != SEAL}
    text = json.dumps({**kept, SEAL: UNSEALED}, indent=1, ensure_ascii=False) + "\n"
    before, _, after = text.encode().rpartition(UNSEALED.encode())
    digest = hashlib.sha256(text.encode()).hexdigest()
    (directory / MANIFEST).write_bytes(before + digest.encode() + after)


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
        _copy_files(libraries, folder)
    _write_loader(directory)
    if native is not None:
        shutil.copyfile(native / native_build.LIBRARY, folder / native_build.LIBRARY)
        _copy_file(native / native_build.COMMAND, directory / native_build.COMMAND)
        native_build.copy_sources(directory / "native")


def include_loaders(directory: Path) -> None:
    """Write what loads a bundle for a GPU, which needs Python, numpy and the driver, into it."""
    _write_loader(directory)
    (directory / "cuda_loader.py").write_bytes(one_file.cuda_loader().encode())


def _write_loader(directory: Path) -> None:
    (directory / "loader.py").write_bytes(one_file.loader().encode())


def _check_target(target: Path, marker: str = MANIFEST) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise UsageError(f"{target} exists and is no directory", "choose another output directory")
    if not any(target.iterdir()):
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):
        content = json.loads((target / marker).read_text(encoding="utf-8"))
        if marker != MANIFEST or (isinstance(content.get("schema"), int) and "bertile" in content):
            return
    raise UsageError(
        f"{target} exists and was not made by Bertile, so it is left alone",
        "choose another output directory",
    )


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """Give an empty directory next to `target`; it is gone at the end unless it was renamed."""
    missing = [parent for parent in target.parents if not parent.exists()]
    directory = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        directory = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        directory.chmod(0o777 & ~_umask())  # mkdtemp's own mode would lock other users out
        yield directory
    except OSError as error:
        name = error.filename2 or error.filename
        place = f" ({name})" if name else ""
        raise BertileError(
            f"cannot write {target}: {error.strerror or error}{place}",
            "free some space or choose another output directory",
        ) from error
    finally:
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)
        if not target.exists():
            for parent in missing:
                with contextlib.suppress(OSError):
                    parent.rmdir()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


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


def _sync(directory: Path) -> None:
    """Force everything to the disk, so that a crash cannot leave a bundle that is only a name."""
    for path in (*directory.rglob("*"), directory):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _rename(directory: Path, target: Path) -> None:
    """Put `directory` in the place of `target`; what was there is left in `directory`."""
    if not target.exists() or not any(target.iterdir()):
        directory.rename(target)
    elif not _exchange(directory, target):
        # without the system call there is a moment in which the bundle has no name
        old = directory.with_name(f"{directory.name}.old")
        target.rename(old)
        try:
            directory.rename(target)
        except OSError:
            old.rename(target)
            raise
        old.rename(directory)
    handle = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two directories in one step with renameat2; False where the system has none."""
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    cwd, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return function(cwd, os.fsencode(first), cwd, os.fsencode(second), exchange) == 0
