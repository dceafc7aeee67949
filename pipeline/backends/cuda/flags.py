"""Refuses what a compile for a GPU is asked for and means nothing on one."""

from __future__ import annotations

from bertile.backends.cuda import precisions
from bertile.base.errors import PlatformError, UsageError
from bertile.codegen.cuda import compiler
from bertile.config import Config
from bertile.targets import detect
from bertile.targets.rows import Target

_NO_HOST_CODE = "a bundle for a GPU has no code for the CPU"


def check(config: Config, row: Target) -> None:
    """UsageError or PlatformError, before anything takes time."""
    if config.libc != "glibc":
        raise UsageError(f"--libc has no meaning for {row.name}: {_NO_HOST_CODE}", "leave it out")
    if config.runtime_from is not None:
        raise UsageError(
            f"--runtime-from has no meaning for {row.name}: {_NO_HOST_CODE}",
            "leave it out; the loader's two files come with the bundle",
        )
    if config.sparse == "always":
        raise UsageError(
            f"no kernel for {row.name} skips zeros: tensor cores are faster with them",
            "leave --sparse out; heads and neurons that are zero are removed in any case",
        )
    if config.exit_threshold is not None:
        raise UsageError(
            f"--exit-threshold is for processors: a bundle for {row.name} runs as a whole",
            "leave it out",
        )
    precisions.check(config.precision, row)
    if config.max_drop is not None:
        card = detect.gpu()
        if isinstance(card, str):
            raise PlatformError(
                f"--max-drop runs the model on many texts, and {card}",
                "compile on a machine with the GPU, or leave it out",
            )
    compiler.find()
