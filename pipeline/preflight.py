"""Checks all that a command is asked for before anything takes time; --dry-run does no more."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from bertile import backends
from bertile.base import directories, extras
from bertile.base.cache import Cache
from bertile.base.errors import BertileError, UsageError
from bertile.base.tables import size
from bertile.config import Config
from bertile.export import asked, cached
from bertile.loader import MANIFEST
from bertile.numerics.precision import PRECISIONS
from bertile.onnx import exported
from bertile.targets import rows
from bertile.targets.rows import Target

_COMPILE = ("tvm", "tvm_ffi", "onnx", "onnxruntime")


def compiling(model: Any, output: str | Path, config: Config) -> Target:
    """The row that a compile is for, where nothing speaks against it.

    Raises what the compile would raise later: UsageError, ModelError, PlatformError,
    MissingExtraError, and BertileError where a directory cannot be written or the disk is too full.
    """
    row = tuning(model, config)
    _writable(output, config, MANIFEST)
    _check_space(model, output, config, PRECISIONS[config.precision].share)
    return row


def exporting(model: Any, output: str | Path, config: Config) -> None:
    """The same for the export stage alone."""
    asked.check(model, config)
    _writable(output, config, exported.MARKER)
    _check_space(model, output, config, 1.0)


def tuning(model: Any, config: Config) -> Target:
    """The same for a search, which writes no bundle."""
    row = rows.with_libc(rows.resolve(config.target, config.threads), config.libc)
    searching = ["xgboost"] if config.tune in ("quick", "full") else []
    extras.must_be_there(*_COMPILE, *searching, *asked.packages(model))
    backends.of(row).check(config, row)
    _check_files(config)
    asked.check(model, config)
    return row


def _check_files(config: Config) -> None:
    for name in ("calibrate", "eval"):
        path = getattr(config, name)
        if path is None:
            continue
        try:
            Path(path).open("rb").close()
        except OSError as error:
            raise UsageError(f"--{name} {path} cannot be read: {error.strerror}") from error
        if not path.endswith(".npz"):
            extras.must_be_there("tokenizers")


def _writable(output: str | Path, config: Config, marker: str) -> None:
    Cache(config.cache_dir).check()
    directories.check(output, marker)


def _check_space(model: Any, output: str | Path, config: Config, share: float) -> None:
    """BertileError where a disk has less room than the results of the stages will take.

    The cache gets the model in ONNX and the bundle, `output` a copy of the last.
    """
    weights = asked.weight_bytes(model)
    cache_place = directories.existing(Cache(config.cache_dir).directory)
    output_place = directories.existing(Path(os.path.realpath(output)))
    copy = int(weights * share)
    wanted = {cache_place: weights + copy, output_place: copy}
    if os.stat(cache_place).st_dev == os.stat(output_place).st_dev:
        wanted = {output_place: weights + 2 * copy}
    short = {
        place: count for place, count in wanted.items() if shutil.disk_usage(place).free < count
    }
    if not short or cached.has(model, config):  # what is there already takes no more room
        return
    place, count = next(iter(short.items()))
    raise BertileError(
        f"the disk of {place} has {size(shutil.disk_usage(place).free)} free, and the results take"
        f" about {size(count)}",
        "make room, or choose other places with -o and --cache-dir",
    )
