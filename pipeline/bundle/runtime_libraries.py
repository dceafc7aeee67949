"""Finds TVM's two runtime libraries for the machine of a target row."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from bertile.base import cache, scratch
from bertile.base.errors import BertileError, PlatformError, UsageError
from bertile.base.fingerprint import hash_path
from bertile.loader import RUNTIME, find_runtime
from bertile.targets.rows import Target, is_foreign

LICENCES = ("LICENSE", "NOTICE")
# pip's requirements with the hashes of the wheels that it may take, by architecture
PINS = {arch: Path(__file__).with_name(f"wheels-{arch}.txt") for arch in ("x86_64", "aarch64")}
_PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17")
_MACHINES = {62: "x86_64", 183: "aarch64", 40: "32-bit ARM", 243: "riscv64"}  # e_machine of ELF


def check(row: Target, source: str | None = None) -> None:
    """Raise what `find` would without fetching anything."""
    if source is not None:
        if not Path(source).exists():
            raise UsageError(
                f"--runtime-from {source} does not exist", "give a wheel or a directory"
            )
    elif "musl" in row.triple:
        raise PlatformError(
            "there are no TVM runtime libraries for musl",
            "build them, or take those for glibc with what pipeline/bundle/README.md says that they"
            " want on musl, and give their directory with --runtime-from; or leave them out with"
            " --no-runtime",
        )
    elif not is_foreign(row):
        find_runtime()
    elif row.arch not in PINS:
        raise PlatformError(
            f"there are no TVM runtime libraries for {row.arch}",
            "build them and give their directory with --runtime-from, or leave them out with"
            " --no-runtime",
        )


def find(row: Target, source: str | None = None, cache_dir: str | None = None) -> Path:
    """A directory with libtvm_ffi.so, libtvm_runtime.so and their licence, for `row`.

    `source` is a wheel, or a directory with wheels or with the libraries themselves; without it
    they are those installed here, or, for another architecture, come out of the wheels of the same
    versions, which pip fetches once. UsageError or PlatformError where they cannot be had.
    """
    check(row, source)
    if source is not None:
        key = cache.key(
            "bundle.runtime_libraries", row.arch, str(Path(source).absolute()), _state(source)
        )
        return _cached(
            key, cache_dir, lambda directory: extract(_parts_of(source), directory, row.arch)
        )
    if not is_foreign(row):
        versions = [str(path) for path in find_runtime()]
        key = cache.key("bundle.runtime_libraries", row.arch, versions)
        return _cached(key, cache_dir, copy_installed)
    # not cache.key, which changes with our own source: these 95 MB are fetched once
    key = f"runtime_libraries-{row.arch}-{hash_path(PINS[row.arch])[:40]}"
    return _cached(key, cache_dir, lambda directory: _fetch(directory, row))


def copy_installed(directory: Path) -> None:
    """Copy the libraries that this machine's own loader uses, with their licence."""
    for name, path in zip(RUNTIME, find_runtime()):
        shutil.copyfile(path, directory / name)
    spec = find_spec("tvm")
    for name in LICENCES:
        if spec and spec.origin and (origin := Path(spec.origin).with_name(name)).is_file():
            shutil.copyfile(origin, directory / name)


def _cached(key: str, cache_dir: str | None, make) -> Path:
    return cache.Cache(cache_dir).get_or_make(key, make)[0]


def _state(source: str) -> list[tuple[str, int, int]]:
    """What changes when a file that was given changes; hashing 95 MB at each compile is slow."""
    path = Path(source)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists()
    ]


def _parts_of(source: str) -> list[Path]:
    """The wheels and libraries of a directory, or a wheel with those that lie beside it."""
    path = Path(source)
    if path.is_dir():
        parts = [file for file in sorted(path.rglob("*")) if _is_part(file)]
    else:
        parts = [path, *sorted(path.parent.glob("apache_tvm*.whl"))]
    return parts


def _is_part(path: Path) -> bool:
    return path.suffix == ".whl" or path.name in (*RUNTIME, *LICENCES)


def _fetch(directory: Path, row: Target) -> None:
    with scratch.directory() as folder:
        extract(sorted(download(row.arch, folder).glob("*.whl")), directory, row.arch)


def download(arch: str, folder: Path) -> Path:
    """Fetch the pinned wheels for an architecture of PINS into `folder`, by pip; return it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += [
        "--disable-pip-version-check",
        "--retries=2",
        "--only-binary=:all:",
        "--python-version=3.11",
    ]
    command += [f"--platform={platform}_{arch}" for platform in _PLATFORMS]
    command += ["--require-hashes", "-r", str(PINS[arch]), "-d", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["pip failed"]
        raise PlatformError(
            f"cannot fetch the TVM runtime for {arch}: {lines[-1].strip()}",
            "connect to a package index once, give the wheels with --runtime-from, or leave the"
            " runtime out with --no-runtime",
        )
    return folder


def extract(sources: Iterable[Path], directory: Path, arch: str) -> None:
    """Put the two libraries and the licences, from files or out of wheels, into `directory`.

    PlatformError where a library is missing, or for another architecture.
    """
    for source in sources:
        if zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as wheel:
                for name in wheel.namelist():
                    if _wanted(name) and not (directory / Path(name).name).exists():
                        (directory / Path(name).name).write_bytes(wheel.read(name))
        elif source.name in (*RUNTIME, *LICENCES):
            shutil.copyfile(source, directory / source.name)
    for name in RUNTIME:
        path = directory / name
        if not path.is_file():
            raise PlatformError(f"what --runtime-from names has no {name}", _both())
        machine = _machine(path)
        if machine != arch:
            raise PlatformError(f"{name} is for {machine}, not for {arch}", _both())


def _wanted(name: str) -> bool:
    folder, _, file = name.rpartition("/")
    return (folder.endswith("lib") and file in RUNTIME) or (folder == "tvm" and file in LICENCES)


def _both() -> str:
    return "give a directory with the wheels apache-tvm and apache-tvm-ffi of that machine"


def _machine(path: Path) -> str:
    with path.open("rb") as file:
        header = file.read(20)
    if len(header) < 20 or header[:4] != b"\x7fELF":
        raise BertileError(f"{path.name} is not an ELF library", _both())
    number = int.from_bytes(header[18:20], "little")
    return _MACHINES.get(number, f"machine {number}")
