"""Reads the file that names the models to serve, which a signal has read again."""

from __future__ import annotations

from pathlib import Path

from bertile.base.errors import UsageError
from bertile.server.settings import model_names


def read_list(path: str | Path) -> dict[str, str]:
    """The directories by name in a file of lines DIR or NAME=DIR; # begins a comment.

    What is relative is so to the file. UsageError for a file that cannot be read, or names none.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--models {path} cannot be read: {error}") from error
    words = [line.partition("#")[0].strip() for line in lines]
    names = model_names([word for word in words if word])
    if not names:
        raise UsageError(f"--models {path} names no model", "write a line NAME=DIR for each")
    return {name: str(path.parent / directory) for name, directory in names.items()}
