"""What tests of bundles for ARM share: the runtime that make test-arm fetches, a compile, a run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bertile import driver, loader
from bertile.config import Config
from bertile.run import qemu as emulator
from bertile.targets import linker, rows

RUNTIME = Path(sys.prefix) / "arm" / "runtime"
MUSL = Path(sys.prefix) / "arm" / "musl"


def need_emulator() -> None:
    """Skip, with the reason, where bundles for ARM cannot be run."""
    reason = emulator.missing(rows.resolve("arm-a72"))
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


def musl_command(folder: Path, bundle: Path) -> list[str]:
    """What stands before the arguments of a musl bundle's bertile-run, whose TVM libraries are
    those for glibc: musl takes the place of glibc's libraries, with the functions that it lacks.
    """
    if not (MUSL / "lib" / "ld-musl-aarch64.so.1").exists():
        pytest.skip(f"{MUSL} has no musl for arm64: make test-arm fetches it")
    libraries = folder / "libraries"
    libraries.mkdir()
    for name in ("libstdc++.so.6", "libgcc_s.so.1"):
        shutil.copy(emulator.sysroot("aarch64") / "lib" / name, libraries)
    (libraries / "ld-linux-aarch64.so.1").symlink_to(MUSL / "lib" / "ld-musl-aarch64.so.1")
    source = Path(__file__).with_name("native") / "musl_glibc.c"
    row = rows.with_libc(rows.resolve("aarch64"), "musl")
    lacking = libraries / "libmusl_glibc.so"
    line = [*linker.link_command(row), "-shared", "-fPIC", "-O1", str(source), "-o", str(lacking)]
    subprocess.run(line, check=True)
    qemu = emulator.command("aarch64", "cortex-a76")[0]
    variables = (f"LD_PRELOAD={lacking}", f"LD_LIBRARY_PATH={libraries}")
    where = [word for variable in variables for word in ("-E", variable)]
    return [qemu, "-L", str(MUSL), *where, "-cpu", "cortex-a76", str(bundle / "bertile-run")]


def instructions(bundle: Path, cpu: str, plugin: Path, tokens: int) -> int:
    """How many instructions one more run of that many tokens takes, in one thread."""
    counts = []
    for repeat in (1, 2):
        line = [*emulator.command("aarch64", cpu), str(bundle / "bertile-run"), "--threads", "1"]
        line += ["--ids", " ".join(map(str, range(1, tokens + 1))), "--repeat", str(repeat)]
        line[1:1] = ["-plugin", str(plugin)]
        done = subprocess.run(line, capture_output=True, text=True, timeout=900, check=True)
        counts.append(int(done.stderr.rpartition("instructions ")[2]))
    return counts[1] - counts[0]
