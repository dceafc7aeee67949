"""What tests of bundles for ARM share: the runtime that make test-arm fetches, a compile, a run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bertile import driver, emulator, loader, targets
from bertile.config import Config

RUNTIME = Path(sys.prefix) / "arm" / "runtime"


def need_emulator() -> None:
    """Skip, with the reason, where bundles for ARM cannot be run."""
    reason = emulator.missing(targets.resolve("arm-a72"))
    if reason is None and not all((RUNTIME / name).is_file() for name in loader.RUNTIME):
        reason = f"{RUNTIME} has no TVM runtime for arm64"
    if reason:
        pytest.skip(f"{reason}: make test-arm installs it")


def compile(model: str, output: Path, cache: str, target: str, precision: str) -> Path:
    """A bundle that `compile` has written and run under the emulator."""
    config = Config(
        target=target,
        precision=precision,
        runtime="include",
        runtime_from=str(RUNTIME),
        cache_dir=cache,
    )
    driver.compile(model, output, config)
    check = loader.read_manifest(output)["check"]
    assert check["emulator"].startswith("qemu-aarch64 -cpu "), check
    assert check["max_abs_difference"] <= check["tolerance"]
    return output


def run(bundle: Path, cpu: str, *arguments: object) -> subprocess.CompletedProcess:
    """The bundle's own bertile-run on one of QEMU's processors, with what lies in the bundle."""
    line = [*emulator.command("aarch64", cpu), str(bundle / "bertile-run"), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=600, check=False)
