"""Checks that the files of a bundle lie inside it, and are those that its manifest describes."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from bertile.loading.errors import BundleError


def check_files(root: Path, files: dict, verify: bool) -> dict[str, Path]:
    """Return the path of every file of the manifest: all inside the bundle, all unchanged."""
    paths = {name: _inside(root, name) for name in files}
    for name, path in paths.items():
        if not os.path.isfile(path):  # unlike Path's, it takes any name
            raise BundleError(f"{root / name} is missing", "copy or compile the bundle again")
        size, expected = path.stat().st_size, files[name]["bytes"]
        if size != expected:
            raise BundleError(
                f"{root / name} has {size} bytes, not {expected}",
                "it is truncated or changed: copy or compile the bundle again",
            )
    if verify:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            hashes = dict(zip(paths, pool.map(sha256, paths.values())))
        for name, digest in hashes.items():
            if digest != files[name]["sha256"]:
                raise BundleError(
                    f"{root / name} has changed since it was compiled",
                    "copy or compile the bundle again",
                )
    return paths


def _inside(root: Path, name: str) -> Path:
    top = os.path.realpath(root)
    path = os.path.realpath(os.path.join(top, name.replace("\0", "..")))  # no path may hold a NUL
    if os.path.isabs(name) or ".." in Path(name).parts or not path.startswith(top + os.sep):
        raise BundleError(f"the manifest of {root} names '{name}', which is outside the bundle")
    return Path(path)


def sha256(path: Path) -> str:
    """Return the hash of a file, in hexadecimal."""
    digest = hashlib.sha256()
    try:
        if path.stat().st_size:
            digest.update(np.memmap(path, np.uint8, "r"))  # outside the GIL, without a copy
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()
