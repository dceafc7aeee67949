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


def fingerprint(path: Path, home: Path | None = None) -> str:
    """The hex SHA-256 of what `onnx_files` lists."""
    digest = hashlib.sha256()
    digest_files(digest, onnx_files(path, home))
    return digest.hexdigest()


def text_files(home: Path) -> list[Path]:
    """List what goes with an ONNX file of the directory `home`: tokenizer, config, settings."""
    places = (home / name for name in sorted({"config.json", *TOKENIZER_FILES, *FILES}))
    return [inside(place, home) for place in places if place.is_file()]


def onnx_files(path: Path, home: Path | None = None) -> list[Path]:
    """List an ONNX file, the files that hold its weights, and the `text_files` of `home` (default:
    the directory that it lies in).
    """
    (onnx,) = require("compile", "onnx")
    locations = {path.name}
    with contextlib.suppress(Exception):  # a damaged file is named where it is read
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            locations.update(
                entry.value for entry in tensor.external_data if entry.key == "location"
            )
    beside = (path.parent / name for name in sorted(locations))
    weights = [file for file in beside if file.is_file() and file != path]
    texts = text_files(path.parent if home is None else home)
    return [path, *(inside(file, path.parent) for file in weights), *texts]


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
