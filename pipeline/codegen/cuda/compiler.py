"""Compiles CUDA C++ text to machine code for a row of GPUs, and to PTX for newer cards. No GPU is
needed, nor a driver: nvcc compiles where there is one, else NVRTC, which pip has.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources, util
from pathlib import Path

from bertile.base import cache, scratch
from bertile.base.errors import BertileError, PlatformError
from bertile.targets.rows import Target

# Older ones do not know sm_90a; PTX of newer ones is refused by the driver of CUDA 13.0.
RELEASES = ((12, 0), (13, 0))
OPTIONS = ("-std=c++17",)
LINES = 20  # of a compiler's complaint that are shown
_SCHEDULES = "bertile.schedules.cuda"
_NVCC = ("nvcc", "/usr/local/cuda/bin/nvcc")


@dataclass(frozen=True)
class Program:
    """``cubin`` runs on the row's GPUs alone, ``ptx`` is compiled by a newer GPU's driver."""

    cubin: bytes
    ptx: bytes
    compiler: str
    seconds: float


@dataclass(frozen=True)
class Compiler:
    """``run(source, architecture)`` gives a cubin for "sm_90a", PTX for "compute_80"."""

    name: str
    run: Callable[[str, str], bytes]


def compile(
    source: str, row: Target, cache_dir: str | None = None, compiler: Compiler | None = None
) -> Program:
    """Compile the source of kernels, which is in the words of the prelude, as one program."""
    compiler = compiler or find()
    text = prelude() + source
    programs = cache.Cache(cache_dir)
    key = cache.key("codegen.cuda.compiler", text, row.name, compiler.name)
    began = time.perf_counter()

    def make(directory: Path) -> None:
        with ThreadPoolExecutor(2) as pool:
            wanted = {"cubin": machine(row), "ptx": virtual(row)}
            runs = {
                name: pool.submit(compiler.run, text, architecture)
                for name, architecture in wanted.items()
            }
        for name, run in runs.items():
            (directory / name).write_bytes(run.result())

    path, _ = programs.get_or_make(key, make)
    seconds = time.perf_counter() - began
    return Program(
        (path / "cubin").read_bytes(), (path / "ptx").read_bytes(), compiler.name, seconds
    )


def machine(row: Target) -> str:
    """The architecture of the row's machine code; sm_90a is what has wgmma."""
    return f"sm_{row.gpu.capability}" + ("a" if row.gpu.wgmma else "")


def virtual(row: Target) -> str:
    """The architecture of the PTX: the oldest that the row's kernels are written for."""
    return f"compute_{min(row.gpu.capability, 80)}"


def prelude() -> str:
    """The words that kernels are written in, as CUDA C++."""
    return resources.files(_SCHEDULES).joinpath("prelude.cuh").read_text("utf-8")


def words() -> bytes:
    """All that schedules have of CUDA C++ in files."""
    files = sorted(resources.files(_SCHEDULES).iterdir(), key=lambda file: file.name)
    return b"".join(file.read_bytes() for file in files if file.name.endswith(".cuh"))


def find() -> Compiler:
    """nvcc or NVRTC, whichever is found first; PlatformError where there is neither."""
    for look in (nvcc, nvrtc):
        if (compiler := look()) is not None:
            return compiler
    oldest, newest = (".".join(map(str, release)) for release in RELEASES)
    raise PlatformError(
        f"no compiler for CUDA from {oldest} to {newest} was found",
        "pip install 'bertile[cuda]', which brings NVRTC; no GPU and no driver are needed",
    )


def nvcc() -> Compiler | None:
    """The toolkit's compiler, which wants a C++ compiler beside it."""
    path = next(filter(None, map(shutil.which, _NVCC)), None)
    if path is None or shutil.which("g++") is None:
        return None
    text = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", text)
    if release is None or not _known(int(release[1]), int(release[2])):
        return None

    def run(source: str, architecture: str) -> bytes:
        kind = "--cubin" if architecture.startswith("sm_") else "--ptx"
        with scratch.directory() as directory:
            code, binary = Path(directory, "kernels.cu"), Path(directory, "kernels.out")
            code.write_text(source, encoding="utf-8")
            command = [path, kind, f"-arch={architecture}", *OPTIONS, "-o", str(binary), str(code)]
            done = subprocess.run(command, capture_output=True, text=True, cwd=directory)
            if done.returncode:
                raise _refused("nvcc", architecture, done.stderr or done.stdout)
            return binary.read_bytes()

    return Compiler(f"nvcc {release[1]}.{release[2]}", run)


def nvrtc() -> Compiler | None:
    """The compiler as a library, out of NVIDIA's pip package."""
    library = next(iter(_libraries()), None)
    if library is None:
        return None
    for part in library.parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(part))  # NVRTC asks for it by name, and finds it where it is loaded
    calls = ctypes.CDLL(str(library))
    major, minor = ctypes.c_int(), ctypes.c_int()
    calls.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    if not _known(major.value, minor.value):
        return None

    def run(source: str, architecture: str) -> bytes:
        return _Nvrtc(calls, source).compile(architecture)

    return Compiler(f"nvrtc {major.value}.{minor.value}", run)


def _known(major: int, minor: int) -> bool:
    return RELEASES[0] <= (major, minor) <= RELEASES[1]


def _libraries() -> list[Path]:
    spec = util.find_spec("nvidia")
    places = spec.submodule_search_locations if spec else None
    libraries = [
        library for place in places or () for library in Path(place).glob("*/lib/libnvrtc.so.1?")
    ]
    return sorted(libraries, reverse=True)


class _Nvrtc:
    """One program of NVRTC; every call but the compilation gives 0."""

    def __init__(self, calls: ctypes.CDLL, source: str) -> None:
        self.calls, self.program = calls, ctypes.c_void_p()
        text = source.encode()
        self._do("CreateProgram", ctypes.byref(self.program), text, b"kernels.cu", 0, None, None)

    def compile(self, architecture: str) -> bytes:
        try:
            options = [f"--gpu-architecture={architecture}".encode(), *map(str.encode, OPTIONS)]
            strings = (ctypes.c_char_p * len(options))(*options)
            if self.calls.nvrtcCompileProgram(self.program, len(options), strings):
                raise _refused("NVRTC", architecture, self._get("ProgramLog").decode())
            return self._get("CUBIN") if architecture.startswith("sm_") else self._get("PTX")
        finally:
            self._do("DestroyProgram", ctypes.byref(self.program))

    def _get(self, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._do(f"Get{what}Size", self.program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._do(f"Get{what}", self.program, buffer)
        return buffer.raw

    def _do(self, name: str, *arguments: object) -> None:
        if status := getattr(self.calls, f"nvrtc{name}")(*arguments):
            raise BertileError(f"nvrtc{name} failed with status {status}", "install NVRTC again")


def _refused(compiler: str, architecture: str, text: str) -> BertileError:
    said: Sequence[str] = [line for line in text.strip("\0\n ").splitlines() if line.strip()]
    shown = "\n".join(said[:LINES])
    return BertileError(
        f"{compiler} does not compile the kernels for {architecture}:\n{shown}",
        "report this with the model and `bertile doctor`'s output",
    )
