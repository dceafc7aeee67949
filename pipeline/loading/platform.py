"""Compares what a bundle needs with this machine: its architecture and the features of its CPU."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

from bertile.loading.errors import PlatformError


def check_platform(target: dict) -> None:
    """Raise PlatformError unless this machine has the architecture and CPU features of `target`.

    Done before the library is opened, so that an illegal instruction is never reached.
    """
    names = {"amd64": "x86_64", "arm64": "aarch64"}
    machine = names.get(platform.machine().lower(), platform.machine())
    if target["arch"] != machine:
        raise PlatformError(
            f"the bundle is for {target['arch']}, this machine is {machine}",
            "compile the model for this machine",
        )
    missing = sorted(set(target["features"]) - cpu_features())
    if missing:
        raise PlatformError(
            f"this CPU lacks {', '.join(missing)}, which the bundle needs "
            f"(target {target.get('name')})",
            "compile the model with a --target that fits this CPU",
        )
    if "amx_tile" in target["features"]:
        _ask_for_tiles()


def _ask_for_tiles() -> None:
    """Let this process use tiles, which Linux gives to those that ask; PlatformError where it
    does not. That children and threads inherit it makes one question enough.
    """
    if ctypes.CDLL(None, use_errno=True).syscall(_ARCH_PRCTL, _REQUEST, _TILE_DATA):
        reason = os.strerror(ctypes.get_errno())
        raise PlatformError(
            f"Linux does not let this process use the CPU's tiles (AMX): {reason}",
            "compile the model with --target x86-avx512-bf16",
        )


_ARCH_PRCTL, _REQUEST, _TILE_DATA = 158, 0x1023, 18  # asm/prctl.h: ARCH_REQ_XCOMP_PERM
_FLAGS = ("flags", "Features")  # what x86 and what ARM call the line in /proc/cpuinfo


def cpu_features() -> set[str]:
    """Return the features of this CPU in the spelling of /proc/cpuinfo; empty where it has none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    pairs = (line.partition(":") for line in lines)
    return next((set(rest.split()) for key, _, rest in pairs if key.strip() in _FLAGS), set())
