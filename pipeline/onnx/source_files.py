"""Finds and hashes the files that an ONNX model consists of."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Any

from bertile.base.errors import ModelError, require
from bertile.base.fingerprint import read_blocks
from bertile.families.text_settings import FILES
from bertile.onnx.exported import TOKENIZER_FILES


def fingerprint(path: Path) -> str:
    """The hex SHA-256 of an ONNX file with its weights and what is copied from beside it."""
    digest = hashlib.sha256()
    digest_files(digest, onnx_files(path))
    return digest.hexdigest()


def onnx_files(path: Path) -> list[Path]:
    """List an ONNX file, the files that hold its weights, and what is copied from beside it."""
    (onnx,) = require("export", "onnx")
    locations = {path.name, "config.json", *TOKENIZER_FILES, *FILES}
    with contextlib.suppress(Exception):  # a damaged file is named where it is read
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            locations.update(
                entry.value for entry in tensor.external_data if entry.key == "location"
            )
    beside = (path.parent / name for name in sorted(locations))
    files = [file for file in beside if file.is_file() and file != path]
    return [path, *(inside(file, path.parent) for file in files)]


def inside(path: Path, directory: Path) -> Path:
    """The path, unless it leads out of `directory`, by a link or by its name: then ModelError.

    What a model's directory names is copied into bundles, and must not be anybody's file. The
    hub's cache keeps what its snapshots link to in a folder beside them, which is theirs too.
    """
    home = directory.resolve()
    homes = [home]
    for place in (home, *home.parents):
        if place.parent.name == "snapshots":
            homes.append(place.parent.parent / "blobs")
    if not any(path.resolve().is_relative_to(allowed) for allowed in homes):
        raise ModelError(
            f"'{path}' leads out of '{directory}', to '{path.resolve()}'",
            "copy the file into the directory",
        )
    return path


def digest_files(digest: Any, paths: list[Path]) -> None:
    for path in paths:
        digest.update(path.name.encode())
        try:
            for block in read_blocks(path):
                digest.update(block)
        except OSError as error:
            raise ModelError(f"'{path}' cannot be read: {error.strerror}") from error
