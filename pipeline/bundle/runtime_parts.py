"""Finds what runs a bundle without Bertile, for a row: TVM's libraries and our C loader."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bertile.base import cache
from bertile.base.fingerprint import hash_path
from bertile.bundle import native_build, runtime_libraries
from bertile.targets.linker import link_command
from bertile.targets.rows import Target


@dataclass(frozen=True)
class RuntimeParts:
    """Two directories: that of `runtime_libraries.find`, that of `native_loader.build`."""

    libraries: Path
    native: Path


def find(row: Target, source: str | None = None, cache_dir: str | None = None) -> RuntimeParts:
    """Both for `row`, from the cache where they were made before; see `runtime_libraries.find`."""
    libraries = runtime_libraries.find(row, source, cache_dir)
    key = cache.key(
        "bundle.native_build", row.triple, link_command(row), hash_path(native_build.SOURCES)
    )
    native, _ = cache.Cache(cache_dir).get_or_make(
        key, lambda directory: native_build.build(row, directory)
    )
    return RuntimeParts(libraries, native)
