"""Bundles for another processor, run here under QEMU's user mode by their own bertile-run."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from bertile import loader
from bertile.base import scratch
from bertile.base.errors import BertileError, InputError, PlatformError
from bertile.bundle.native_build import COMMAND
from bertile.targets.rows import Target

# QEMU's processors by architecture, the least first, with their features that rows ask for.
PROCESSORS: dict[str, tuple[tuple[str, frozenset[str]], ...]] = {
    "aarch64": (
        ("cortex-a72", frozenset({"asimd"})),
        ("cortex-a76", frozenset({"asimd", "asimdhp", "asimddp"})),
        (
            "max",
            frozenset({"asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"}),
        ),
    )
}
_SECONDS = 1800  # the longest emulated run


def missing(row: Target) -> str | None:
    """Why a bundle for `row` cannot be emulated here, or None where it can."""
    if row.arch not in PROCESSORS:
        return f"this machine cannot emulate {row.arch}"
    if _qemu(row.arch) is None:
        return f"qemu-{row.arch} is not installed"
    if not (sysroot(row.arch) / "lib").is_dir():
        return f"{sysroot(row.arch)} has no libraries of {row.arch}"
    if processor(row) is None:
        return f"qemu-{row.arch} has no processor with {' '.join(row.features)}"
    return None


def processor(row: Target) -> str | None:
    """The least of QEMU's processors that has the row's features."""
    known = PROCESSORS.get(row.arch, ())
    return next((name for name, has in known if has.issuperset(row.features)), None)


def command(arch: str, cpu: str) -> list[str]:
    """What stands before the name of a program to run it as on `cpu`."""
    qemu = _qemu(arch)
    if qemu is None:
        raise PlatformError(f"qemu-{arch} is not installed", "install it with: make test-arm")
    return [qemu, "-L", str(sysroot(arch)), "-cpu", cpu]


class Model:
    """A bundle for another processor, called as `loader.Model` is; each call is a new process."""

    def __init__(
        self,
        directory: Path,
        native: Path,
        libraries: Path,
        row: Target,
        threads: int | None = None,
    ) -> None:
        self.manifest = loader.read_manifest(directory)
        self.inputs = tuple(spec["name"] for spec in self.manifest["inputs"])
        cpu = processor(row) or "max"
        self.name = f"qemu-{row.arch} -cpu {cpu}"
        self._command = command(row.arch, cpu)
        self._command += [str(native / COMMAND), str(directory), "--runtime", str(libraries)]
        self._command += ["--skip-hashes"]
        self._command += ["--threads", str(threads)] if threads else []

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exception: object) -> None:
        pass  # each call is a process that has ended

    def __call__(self, /, **inputs: Any) -> dict[str, np.ndarray]:
        with scratch.directory() as folder:
            request, reply = Path(folder, "in.npz"), Path(folder, "out.npz")
            np.savez(request, **{name: np.asarray(value) for name, value in inputs.items()})
            self.run("--input", str(request), "--output", str(reply))
            with np.load(reply) as outputs:
                return {name: outputs[name] for name in outputs.files}

    def run(self, *arguments: str) -> str:
        """What bertile-run prints; its error is raised as the kind that its exit code says."""
        line = [*self._command, *arguments]
        done = subprocess.run(line, capture_output=True, text=True, timeout=_SECONDS, check=False)
        if done.returncode == 0:
            return done.stdout
        kinds = {2: InputError, 3: PlatformError}
        reason = done.stderr.strip() or f"it ended with code {done.returncode}"
        raise kinds.get(done.returncode, BertileError)(reason.removeprefix(f"{COMMAND}: "))


def sysroot(arch: str) -> Path:
    """Where the libraries of that machine lie: QEMU's own variable, else Debian's place."""
    return Path(os.environ.get("QEMU_LD_PREFIX") or f"/usr/{arch}-linux-gnu")


def _qemu(arch: str) -> str | None:
    return shutil.which(f"qemu-{arch}") or shutil.which(f"qemu-{arch}-static")
