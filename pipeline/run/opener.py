"""Opens a bundle for a processor: by the loader, or by its own bertile-run under QEMU."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bertile import loader
from bertile.base.errors import PlatformError
from bertile.bundle import native_build, runtime_parts
from bertile.bundle.runtime_parts import RuntimeParts
from bertile.run import qemu
from bertile.targets import rows
from bertile.targets.rows import Target, is_foreign

Parts = Callable[[], RuntimeParts]


def opened(
    directory: Path, threads: int | None = None, parts: Parts | None = None, verify: bool = True
) -> loader.Model | qemu.Model:
    """The bundle, to be called with arrays by input name; a context manager.

    `parts` give what a bundle for another processor is run with where it does not bring that along
    (default: :func:`parts_of`). Raises PlatformError where it cannot be run here.
    """
    manifest = loader.read_manifest(directory)
    if not _elsewhere(manifest):
        return loader.load(directory, threads, verify=verify)
    row = row_of(manifest)
    must_run(row)
    if (directory / native_build.COMMAND).is_file():
        runtime = RuntimeParts(directory / "runtime", directory)
    else:
        runtime = (parts or parts_of(directory))()
    if verify:
        loader.check_files(directory, manifest["files"], verify)
    return qemu.Model(directory, runtime.native, runtime.libraries, row, threads)


def parts_of(directory: Path, source: str | None = None) -> Parts:
    """What finds the runtime for a bundle; `source` as in `runtime_libraries.find`."""
    return lambda: runtime_parts.find(row_of(loader.read_manifest(directory)), source)


def row_of(manifest: dict[str, Any]) -> Target:
    """The target row that a bundle was made for."""
    libc = manifest["config"].get("libc", "glibc")
    return rows.with_libc(rows.resolve(manifest["target"]["name"]), libc)


def cannot_run(row: Target) -> str | None:
    """Why a bundle for `row` cannot be run here, or None where it can, or should."""
    if "musl" in row.triple:
        return "it is linked for musl"
    return qemu.missing(row) if is_foreign(row) else None


def must_run(row: Target) -> None:
    """Raises PlatformError with the reason where a bundle for `row` cannot be run here."""
    reason = cannot_run(row)
    if reason is None:
        return
    remedy = "run it on such a machine: bertile-run is in every bundle made without --no-runtime"
    if row.arch in qemu.PROCESSORS and "musl" not in row.triple:
        remedy = "apt install qemu-user libstdc++6-arm64-cross, or run it on such a machine"
    raise PlatformError(f"a bundle for {row.name} cannot be run here: {reason}", remedy)


def _elsewhere(manifest: dict[str, Any]) -> bool:
    """Whether it is not the loader that runs it."""
    foreign = manifest["target"]["arch"] != platform.machine()
    return foreign or manifest["config"].get("libc") == "musl"
