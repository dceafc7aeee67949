"""Gives out temporary directories, and takes away those that killed processes have left.

Each is locked by the process that uses it, and the system gives the lock back however that ends.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bertile.base.errors import BertileError

try:
    import fcntl
except ImportError:  # not a POSIX system: nobody knows whose a directory is
    fcntl = None  # type: ignore[assignment]

RANDOM = r"[a-z0-9_]{8}"  # with which a name from `mkdtemp` ends
# Where locks do not work, as on some network disks, what is this old is nobody's any more.
OLD_SECONDS = 24 * 3600
ATTEMPTS = 100  # at a directory that others take away as soon as it is made


@contextlib.contextmanager
def directory(prefix: str = "") -> Iterator[Path]:
    """An empty directory of this process alone, gone at the end.

    All are in one directory of this user in the system's temporary one. Whichever of them nobody
    holds goes first. Raises BertileError where that directory is somebody else's.
    """
    home = _home()
    try:
        with held(home, prefix, clear_all=True) as path:
            yield path
    finally:
        with contextlib.suppress(OSError):  # another process has one in it, or was first
            home.rmdir()


@contextlib.contextmanager
def held(home: Path, prefix: str, clear_all: bool = False) -> Iterator[Path]:
    """An empty directory in `home`, gone at the end unless it has got another name.

    What killed processes have left there under this prefix goes first; with `clear_all`, under any.
    """
    if home.is_dir():
        clear(home, ".*" if clear_all else re.escape(prefix))
    path, handle = _make(home, prefix)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)  # ours, as all that is in it
        os.close(handle)


def clear(home: Path, prefix: str) -> None:
    """Remove what `held` has given out in `home` to processes that are gone.

    `prefix` is an expression; names that match it and go on as `held` names them are looked at.
    """
    ours = re.compile(prefix + RANDOM)
    with contextlib.suppress(FileNotFoundError):
        for path in [path for path in home.iterdir() if ours.fullmatch(path.name)]:
            with unheld(path) as free:
                if free:
                    shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def unheld(path: Path) -> Iterator[bool]:
    """Whether a directory is there that nobody holds; until the end nobody else will."""
    with contextlib.ExitStack() as stack:
        try:
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # gone meanwhile, no directory, or another user's
            yield False
            return
        stack.callback(os.close, handle)
        yield _lock(handle, wait=False)


def _lock(handle: int, wait: bool) -> bool:
    if fcntl is not None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            return True
        except BlockingIOError:
            return False
        except OSError:
            pass  # a disk without locks
    return time.time() - os.fstat(handle).st_mtime > OLD_SECONDS


def _make(home: Path, prefix: str) -> tuple[Path, int]:
    lost = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(home))
    for _ in range(ATTEMPTS):
        with contextlib.suppress(FileExistsError):
            os.mkdir(home, 0o700)
        try:
            path = Path(tempfile.mkdtemp(prefix=prefix, dir=home))
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError as error:  # `home`, or it, was taken away in between
            lost = error
            continue
        _lock(handle, wait=True)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.lstat()):
                return path, handle
        os.close(handle)
    raise lost  # by no process of ours: /proc, say, has no room for a directory


def _home() -> Path:
    user = os.getuid() if hasattr(os, "getuid") else "files"
    home = Path(tempfile.gettempdir(), f"bertile-scratch-{user}").absolute()
    with contextlib.suppress(FileNotFoundError):  # another process of ours was done with it
        state = home.lstat()
        private = stat.S_ISDIR(state.st_mode) and not state.st_mode & 0o022
        if not private or state.st_uid != getattr(os, "getuid", lambda: state.st_uid)():
            raise BertileError(
                f"{home} is not a directory of your own",
                "remove it, or set TMPDIR to another place",
            )
    return home
