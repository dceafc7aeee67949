"""Puts a directory into its place whole or not at all; replaces nothing but Bertile's own files.

A directory is Bertile's if its marker says so: a JSON file with "bertile", a "schema" and the
"files" that were written. What else lies in it is somebody's, and stays.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bertile.base import scratch
from bertile.base.errors import BertileError, UsageError

SCHEMA = 1  # of a marker that has none of its own
_ELSEWHERE = "choose another output directory"


def mark(directory: Path, marker: str, content: dict[str, Any]) -> dict[str, Any]:
    """Write `content` as the marker of what lies in `directory`; return all that it says."""
    files = sorted(path.relative_to(directory).as_posix() for path in _files(directory))
    said = {"bertile": version("bertile"), "schema": SCHEMA, **content, "files": files}
    text = json.dumps(said, indent=2, ensure_ascii=False)
    (directory / marker).write_text(text + "\n", encoding="utf-8")
    return said


@contextlib.contextmanager
def making(output: str | os.PathLike, marker: str) -> Iterator[Path]:
    """Give an empty directory to fill, which becomes `output` at the end; nothing if that raises.

    The files that the marker of an older result names are replaced, what else lies there stays.
    Raises UsageError for a directory that is not empty and has no such marker, and for a file of
    somebody's that is in the way; BertileError where the disk does not take it.
    """
    missing: list[Path] = []
    try:
        with _explained(output):
            target = Path(os.path.realpath(output))
            owned = _owned(target, marker)
            missing = [parent for parent in target.parents if not parent.exists()]
            inside = owned is not None and _must_stay(target)
            home = target if inside else target.parent
            home.mkdir(parents=True, exist_ok=True)
            with _temporary(home, target.name) as directory:
                yield directory
                _sync(directory)
                if inside:
                    _fill(directory, target, owned, marker)
                else:
                    _rename(directory, target, owned)
            missing = []
    finally:
        with contextlib.suppress(OSError):
            for parent in missing if not target.exists() else ():
                parent.rmdir()


def check(output: str | os.PathLike, marker: str) -> None:
    """Raise at once what `making` would of a directory that it may not replace or cannot write."""
    with _explained(output):
        target = Path(os.path.realpath(output))
        inside = _owned(target, marker) is not None and _must_stay(target)
        must_be_writable(target if inside else existing(target.parent))


def existing(directory: Path) -> Path:
    """The directory itself, or the nearest around it that is there."""
    return next(place for place in (directory, *directory.parents) if os.path.lexists(place))


def must_be_writable(directory: Path) -> None:
    """OSError where no directory can be made in this one: tried, since root may what modes deny."""
    with scratch.held(directory, ".bertile-check-"):
        pass


@contextlib.contextmanager
def _explained(output: str | os.PathLike) -> Iterator[None]:
    """What the system refuses, as a BertileError that names the output."""
    try:
        yield
    except OSError as error:
        target = os.path.realpath(output)
        name = error.filename2 or error.filename
        place = f" ({name})" if name and len(str(name)) < 200 else ""
        shown = target if len(target) < 200 else f"{target[:100]}…"
        raise BertileError(
            f"cannot write {shown}: {error.strerror or error}{place}",
            "free some space or choose another output directory",
        ) from error


def copy_file(source: Path, place: Path) -> None:
    """Copy the bytes, and whether it is a program."""
    shutil.copyfile(source, place)
    if os.access(source, os.X_OK):
        place.chmod(0o777 & ~_umask())


def copy_files(source: Path, directory: Path) -> None:
    """Copy all that lies in a directory into another."""
    # not copytree: it goes on when the disk is full, and raises a list of every file that failed
    for path in sorted(source.rglob("*")):
        place = directory / path.relative_to(source)
        if path.is_dir():
            place.mkdir()
        else:
            copy_file(path, place)


def _owned(target: Path, marker: str) -> set[str] | None:
    """The names of Bertile's files in a directory, none in an empty one; None where none is."""
    if not os.path.lexists(target):
        return None
    if not target.is_dir():
        raise UsageError(f"{target} exists and is not a directory", _ELSEWHERE)
    if not any(target.iterdir()):
        return set()
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        content = json.loads((target / marker).read_text(encoding="utf-8"))
        if isinstance(content["schema"], int) and "bertile" in content:
            return {marker, *(str(name) for name in content["files"])}
    raise UsageError(
        f"{target} exists and was not made by Bertile, so it is left alone", _ELSEWHERE
    )


def _must_stay(target: Path) -> bool:
    """Whether a directory itself cannot be replaced: somebody stands in it, or it is a mount."""
    return not any(target.iterdir()) or os.path.ismount(target) or os.path.samefile(target, ".")


@contextlib.contextmanager
def _temporary(home: Path, name: str) -> Iterator[Path]:
    """An empty directory in `home`, gone at the end unless it was renamed; what killed processes
    have left there goes first.
    """
    with scratch.held(home, f".{name[:100]}.bertile-") as directory:
        directory.chmod(0o777 & ~_umask())  # its own mode would lock other users out
        yield directory


def _rename(directory: Path, target: Path, owned: set[str] | None) -> None:
    """Put `directory` in the place of `target`, with what is not Bertile's in there."""
    if owned is None:
        directory.rename(target)
        _sync_names(target.parent)
        return
    kept = _link_foreign(target, directory, owned)
    old = directory.with_name(f".{target.name[:100]}.older-{directory.name[-8:]}")
    if _exchange(directory, target):
        directory.rename(old)
    else:  # without the system call there is a moment in which the bundle has no name
        target.rename(old)
        try:
            directory.rename(target)
        except OSError:
            old.rename(target)
            raise
    _sync_names(target.parent)
    _discard(old, owned | kept)


def _fill(directory: Path, target: Path, owned: set[str], marker: str) -> None:
    """Move what `directory` holds into `target`, which stays itself; the marker goes last."""
    new = {path.relative_to(directory).as_posix() for path in _files(directory)}
    for name in sorted(new - owned):
        if os.path.lexists(target / name):
            raise _in_the_way(target / name)
    (target / marker).unlink(missing_ok=True)
    for name in sorted(new - {marker}):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(directory / name, target / name)
    _remove(target, owned - new)
    os.replace(directory / marker, target / marker)
    _sync_names(target)


def _link_foreign(target: Path, directory: Path, owned: set[str]) -> set[str]:
    """Give what is not Bertile's in `target` a second name in `directory`; return the names."""
    kept = set()
    for path in _files(target, empty=True):
        name = path.relative_to(target).as_posix()
        if name in owned:
            continue
        place = directory / name
        if os.path.lexists(place):
            if path.is_dir() and place.is_dir():
                continue
            raise _in_the_way(path)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir() and not path.is_symlink():
                place.mkdir()
            else:
                os.link(path, place, follow_symlinks=False)
        except OSError as error:
            raise UsageError(
                f"{target} holds something that Bertile did not write and cannot keep: {name}"
                f" ({error.strerror})",
                "move it away, or choose another output directory",
            ) from error
        kept.add(name)
    return kept


def _in_the_way(path: Path) -> UsageError:
    return UsageError(
        f"{path} was not written by Bertile, and would be overwritten",
        "move it away, or choose another output directory",
    )


def _discard(old: Path, names: set[str]) -> None:
    """Remove an older result, file by file; what was put there meanwhile is left and named."""
    _remove(old, names)
    with contextlib.suppress(OSError):  # what is not empty is told
        old.rmdir()
    if os.path.lexists(old):
        raise BertileError(
            f"the new result is in its place; what was put into the older one meanwhile is in {old}"
        )


def _remove(directory: Path, names: set[str]) -> None:
    """Remove what has these names, and the directories around it that this empties."""
    root = Path(os.path.realpath(directory))
    for name in sorted(names, reverse=True):
        path = directory / name
        if ".." in path.parts or not Path(os.path.realpath(path.parent)).is_relative_to(root):
            continue  # a marker of somebody else's making
        with contextlib.suppress(FileNotFoundError):
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink()
        for parent in path.parents[: len(path.relative_to(directory).parts) - 1]:
            with contextlib.suppress(OSError):  # not empty
                parent.rmdir()


def _files(directory: Path, empty: bool = False) -> Iterator[Path]:
    """All that lies in a directory and is none, links as they are; empty directories if asked."""
    for folder, folders, files in os.walk(directory):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        yield from (Path(folder, name) for name in (*files, *links))
        if empty and not folders and not files and folder != str(directory):
            yield Path(folder)


def _sync(directory: Path) -> None:
    """Force everything to the disk, so that a crash cannot leave a bundle that is only a name."""
    for path in (*directory.rglob("*"), directory):
        _sync_names(path)


def _sync_names(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
