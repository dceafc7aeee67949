"""Keeps what stages made, each in a directory under the hash of what went into it."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import importlib.metadata
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from bertile.base import directories, scratch
from bertile.base.errors import BertileError
from bertile.base.fingerprint import own_hash, source_hash

try:
    import fcntl
except ImportError:  # not a POSIX system: the renames alone keep entries whole
    fcntl = None  # type: ignore[assignment]

LIMIT_BYTES = 20 * 1024**3
# An entry used this recently may be in use by another process, so it is never pruned.
IN_USE_SECONDS = 3600
# What decides about a stage's result beside its own source and its inputs.
DEPENDENCIES = (
    "apache-tvm",
    "apache-tvm-ffi",
    "numpy",
    "onnx",
    "onnxscript",
    "sentencepiece",
    "tokenizers",
    "torch",
    "transformers",
    "xgboost-cpu",
)


def key(stage: str, *parts: Any, modules: Sequence[str] = ()) -> str:
    """The cache key of one run of a stage.

    `stage` is the stage's module in bertile ("export.exporter"). The key changes with that module's
    source and every bertile module that it reaches by import (where `modules` are given: that these
    reach, since a stage's module may import what this run of it has no use for), with Bertile's and
    its dependencies' versions, and with `parts`: plain values, bytes and dataclasses. A path is no
    part: pass `hash_path` of it.
    """
    own = f"bertile.{stage}"
    sources = [source_hash(own)]
    if modules:
        sources = [own_hash(own), source_hash(*(f"bertile.{module}" for module in modules))]
    fingerprint = [stage, _versions(), sources, parts]
    text = json.dumps(fingerprint, sort_keys=True, default=_plain)
    return f"{stage}-{hashlib.sha256(text.encode()).hexdigest()[:40]}"


class Cache:
    """Directories under one directory, by key; whole or not there, whoever else is at work."""

    def __init__(self, directory: Path | str | None = None, limit_bytes: int = LIMIT_BYTES):
        self.directory = Path(directory or "~/.cache/bertile").expanduser().absolute()
        self.limit_bytes = limit_bytes

    def check(self) -> None:
        """BertileError where the cache cannot be written."""
        try:
            directories.must_be_writable(directories.existing(self.directory))
        except OSError as error:
            raise _unwritable(self.directory, error) from error

    def has(self, key: str) -> bool:
        """Whether the entry of a key is there, and whole."""
        return _is_whole(self.directory / key)

    def get_or_make(self, key: str, make: Callable[[Path], None]) -> tuple[Path, bool]:
        """The directory of `key` and whether it was there; else `make` fills a new one.

        A second process that asks for the same key waits for the first. What `make` raises is
        raised, and nothing of the entry stays.
        """
        entry = self.directory / key
        with _writing(self.directory), self._lock(key):
            scratch.clear(self.directory, r"\..+-")
            if _is_whole(entry):
                os.utime(entry)
                return entry / "content", True
            self._remove(entry)
            self._make(entry, make)
        self.prune()
        return entry / "content", False

    def stages(self) -> dict[str, dict[str, int]]:
        """What the cache holds by the name of the stage: "entries" and "bytes", the largest first;
        what stopped processes left is "leftovers".
        """
        stages: dict[str, dict[str, int]] = {}
        for _, size, entry in self._entries():
            name = "leftovers" if entry.name.startswith(".") else entry.name.rpartition("-")[0]
            stage = stages.setdefault(name, {"entries": 0, "bytes": 0})
            stage["entries"] += 1
            stage["bytes"] += size
        return dict(sorted(stages.items(), key=lambda item: -item[1]["bytes"]))

    def prune(self, limit_bytes: int | None = None, spared: float = IN_USE_SECONDS) -> int:
        """Remove the entries used longest ago until the rest fits, but none that was used in the
        last `spared` seconds; returns the bytes freed.
        """
        limit = self.limit_bytes if limit_bytes is None else limit_bytes
        freed = kept = 0
        for used, size, entry in sorted(self._entries(), reverse=True):
            leftover = entry.name.startswith(".")
            keep = not leftover and kept + size <= limit
            with scratch.unheld(entry) if leftover else contextlib.nullcontext(True) as free:
                removed = free and not keep and self._remove_unused(entry, used, spared)
            freed += size * removed
            kept += size * (not removed)
        return freed

    def _make(self, entry: Path, make: Callable[[Path], None]) -> None:
        with scratch.held(self.directory, f".{entry.name}-") as making:
            (making / "content").mkdir()
            make(making / "content")
            sizes = json.dumps(_sizes(making / "content"))
            (making / "entry.json").write_text(sizes, encoding="utf-8")
            # Where locks do not work (some network disks) another process may have been first.
            if not _is_whole(entry):
                making.rename(entry)

    def _entries(self) -> Iterator[tuple[float, int, Path]]:
        for entry in self.directory.iterdir() if self.directory.is_dir() else ():
            with contextlib.suppress(OSError):  # removed by another process meanwhile
                if entry.is_dir() and entry.name != "locks":
                    yield entry.stat().st_mtime, sum(_sizes(entry).values()), entry

    def _remove_unused(self, entry: Path, used: float, spared: float) -> bool:
        if time.time() - used < spared:
            return False
        with self._lock(entry.name, wait=False) as held, contextlib.suppress(OSError):
            if held and entry.stat().st_mtime == used:
                self._remove(entry)
                return True
        return False

    def _remove(self, entry: Path) -> None:
        # renamed first, so that nobody ever sees half an entry under its name
        with contextlib.suppress(FileNotFoundError):
            with scratch.held(self.directory, f".{entry.name.lstrip('.')}-") as gone:
                entry.rename(gone / "entry")

    @contextlib.contextmanager
    def _lock(self, key: str, wait: bool = True) -> Iterator[bool]:
        locks = self.directory / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with open(locks / key, "w", encoding="ascii") as lock:
            try:
                if fcntl:
                    fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            except OSError:
                pass  # a disk without locks: the renames alone keep entries whole
            yield True  # closing the file gives the lock back, a killed process does too


@cache
def _versions() -> tuple[tuple[str, str | None], ...]:
    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return tuple((package, version(package)) for package in ("bertile", *DEPENDENCIES))


def _plain(value: Any) -> Any:
    if isinstance(value, (bytes, bytearray)):
        return {"sha256": hashlib.sha256(value).hexdigest()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{type(value).__name__} cannot be part of a cache key: hash it first")


def _sizes(directory: Path) -> dict[str, int]:
    files = (file for file in directory.rglob("*") if file.is_file())
    return {file.relative_to(directory).as_posix(): file.stat().st_size for file in files}


def _is_whole(entry: Path) -> bool:
    # A crash of the machine can leave an entry with empty files: sizes are compared, not trusted.
    try:
        return json.loads((entry / "entry.json").read_bytes()) == _sizes(entry / "content")
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        ours = str(error.filename or "").startswith(str(directory))
        if ours or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise _unwritable(directory, error) from error
        raise


def _unwritable(directory: Path, error: OSError) -> BertileError:
    remedy = "make room or give another directory with --cache-dir"
    return BertileError(f"the cache {directory}: {error.strerror}", remedy)
