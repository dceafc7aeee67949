"""Finds the command that links a shared library for a row."""

from __future__ import annotations

import platform
import shutil
import sys
from importlib import util

from bertile.base.errors import PlatformError
from bertile.targets.rows import Target


def link_command(row: Target) -> list[str]:
    """The command that links a shared library for `row`: the host's `cc`, else pip's ziglang."""
    musl = "musl" in row.triple
    host = row.arch == platform.machine() and not musl
    if host and (cc := shutil.which("cc") or shutil.which("gcc")):
        return [cc]
    if util.find_spec("ziglang"):
        dynamic = ["-dynamic"] if musl else []  # zig's own choice for musl is static
        return [sys.executable, "-m", "ziglang", "cc", "-target", row.triple, *dynamic]
    raise PlatformError(
        f"no linker for {row.arch} was found", "install a C compiler, or: pip install ziglang"
    )
