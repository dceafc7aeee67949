"""CUDA kernels on the CPU: their text is compiled by the host's C++ compiler with the words of
emulation.h, and run with every access to memory checked.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Union

import numpy as np

from bertile.cuda_loader import evaluate
from bertile.errors import BertileError, PlatformError
from bertile.schedules.cuda.source import Kernel

Argument = Union[np.ndarray, np.generic]

_APART = 1 << 16
_HERE = Path(__file__).parent
_PARTS = (
    "emulation.cpp",
    "emulation.h",
    "emulation_memory.h",
    "emulation_tensor.h",
    "emulation_wgmma.h",
)
_DRIVER = ("fake_driver.c", "fake_image.h")
_COMMON = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-strict-aliasing")
# Every access to memory becomes a call of the emulator, which takes the sanitizer's place.
_CHECKED = ("-O2", "-w", "-fsanitize=thread")
_ENTRY = re.compile(r'extern\s+"C"\s+__global__\s+void\b')
_DYNAMIC = re.compile(
    r"extern\s+__shared__\s+(?:__align__\(\d+\)\s+)?([\w\s]+?)\s+(\w+)\s*\[\s*\]\s*;"
)


class EmulationError(BertileError):
    """A kernel did what it must not do on a GPU."""


def missing() -> str | None:
    """Why nothing can be emulated here, or None."""
    return None if _compiler() else "there is no C++ compiler (g++ or clang++)"


def build(source: str, directory: Path) -> Path:
    """A library of the entries of `source` (without prelude), kept in `directory` by content."""
    text = _host_text(source)
    name = hashlib.sha256("\0".join((_runtime_key(), text)).encode()).hexdigest()[:24]
    made = directory / f"kernels-{name}.so"
    if made.exists():
        return made
    runtime = _runtime(directory)
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        unit, unlinked, linked = (Path(folder, f"kernels{end}") for end in (".cpp", ".o", ".so"))
        unit.write_text(text, encoding="utf-8")
        _compile(*_CHECKED, *_no_calls(), f"-I{_HERE}", "-c", str(unit), "-o", str(unlinked))
        _compile("-shared", "-Wl,-Bsymbolic", str(unlinked), str(runtime), "-o", str(linked), "-lm")
        linked.replace(made)
    return made


def driver(directory: Path) -> Path:
    """A library in the place of the NVIDIA driver's (fake_driver.c), kept in `directory`.

    It runs the kernels of the library that the variable BERTILE_EMULATED_KERNELS names, which
    `build` made of the same source as the code that is loaded.
    """
    parts = [(_HERE / name).read_bytes() for name in _DRIVER]
    made = directory / f"libcuda-{hashlib.sha256(b''.join(parts)).hexdigest()[:24]}.so"
    if not made.exists():
        with tempfile.TemporaryDirectory(dir=directory) as folder:
            linked = Path(folder, "libcuda.so")
            flags = ("-std=gnu11", "-O2", "-fPIC", "-fvisibility=hidden", "-shared", "-pthread")
            _run("-x", "c", *flags, str(_HERE / _DRIVER[0]), "-o", str(linked), "-ldl")
            linked.replace(made)
    return made


class Emulated:
    """The entries of a library that `build` made."""

    def __init__(self, path: Path, seed: int = 0) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.emulated_error.restype = ctypes.c_char_p
        self._library.emulated_seed(ctypes.c_uint64(seed))
        self._lock = threading.Lock()

    def launch(
        self,
        entry: str,
        grid: Sequence[int],
        threads: int,
        shared: int,
        arguments: Sequence[Argument],
    ) -> None:
        """Run one launch; arrays are written in place, scalars must have the parameter's dtype.

        Raises EmulationError with what the kernel did wrong.
        """
        with self._lock:
            self._launch(entry, grid, threads, shared, arguments)

    def _launch(
        self,
        entry: str,
        grid: Sequence[int],
        threads: int,
        shared: int,
        arguments: Sequence[Argument],
    ) -> None:
        values = []
        self._library.emulated_forget()
        for one in arguments:
            if isinstance(one, np.ndarray):
                if not one.flags["C_CONTIGUOUS"] or one.ctypes.data % 16:
                    raise ValueError("arrays must be contiguous, from a multiple of 16")
                self._library.emulated_memory(
                    ctypes.c_void_p(one.ctypes.data), ctypes.c_size_t(one.nbytes)
                )
                values.append(ctypes.c_void_p(one.ctypes.data))
            else:
                values.append(ctypes.create_string_buffer(one.tobytes()))
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(one) for one in values])
        run = getattr(self._library, f"emulated_{entry}")
        run((ctypes.c_uint * 3)(*grid), ctypes.c_uint(threads), ctypes.c_uint(shared), pointers)
        mistake = self._library.emulated_error()
        if mistake:
            raise EmulationError(mistake.decode())


def run_kernel(
    kernel: Kernel,
    arrays: Sequence[np.ndarray],
    symbols: Mapping[str, int],
    directory: Path | None = None,
    seed: int = 0,
) -> None:
    """Run the launches of `kernel` that there are for these symbols on `arrays`, its operands in
    order; results are in place.

    Scratch starts as NaN. Libraries are kept in `directory`, by default one of this process's user.
    """
    folder = directory or kept()
    folder.mkdir(parents=True, exist_ok=True)
    emulated = Emulated(build(kernel.source, folder), seed)
    if len(arrays) != len(kernel.operands):
        raise ValueError(f"{len(arrays)} arrays for the operands {', '.join(kernel.operands)}")
    given = [_apart(array) for array in arrays]
    named: dict[str, Argument] = dict(zip(kernel.operands, given))
    for name, extent in kernel.scratch.items():
        named[name] = aligned(evaluate(extent, symbols), np.uint8)
        named[name].fill(0xFF)
    for name, value in symbols.items():
        named.setdefault(name, np.int32(value))
    for launch in kernel.launches:
        if evaluate(launch.when, symbols) <= 0:
            continue
        grid = [evaluate(extent, symbols) for extent in launch.grid]
        arguments = [named[name] for name in launch.arguments]
        emulated.launch(launch.entry, grid, launch.threads, launch.shared, arguments)
    for array, copy in zip(arrays, given):
        array[...] = copy


def aligned(
    shape: int | tuple[int, ...], dtype: np.dtype | type, boundary: int = 256
) -> np.ndarray:
    """An empty array from a multiple of `boundary` bytes, as a GPU's allocations are.

    Nothing else lies near it, so what goes beyond its ends is found.
    """
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.empty(_APART + count + boundary + _APART, np.uint8)
    first = _APART + -memory.ctypes.data % boundary
    return memory[first : first + count].view(dtype).reshape(shape)


def _apart(array: np.ndarray) -> np.ndarray:
    copy = aligned(array.shape, array.dtype)
    copy[...] = array
    return copy


def _host_text(source: str) -> str:
    """The C++ unit for `source`: dynamic shared memory as a pointer, and one export per entry."""
    text = _DYNAMIC.sub(r"\1* const \2 = (\1*)emulated_shared_memory;", source)
    lines = [f"EMULATED_ENTRY({name}, {limit})" for name, limit in _entries(source).items()]
    return "\n".join(['#include "emulation.h"', text, *lines, ""])


def _entries(source: str) -> dict[str, str]:
    """The names of the entries and the thread limits of their launch bounds (C++, "0": none)."""
    found: dict[str, str] = {}
    for match in _ENTRY.finditer(source):
        at, limit = match.end(), "0"
        bounds = re.compile(r"\s*__launch_bounds__\s*\(").match(source, at)
        if bounds:
            at = _closing(source, bounds.end())
            limit = _first_argument(source[bounds.end() : at - 1])
        name = re.compile(r"\s*(\w+)\s*\(").match(source, at)
        if name:
            found[name[1]] = limit
    return found


def _closing(text: str, at: int) -> int:
    """The position behind the parenthesis that closes the one open before `at`."""
    depth = 1
    while depth:
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        at += 1
    return at


def _first_argument(text: str) -> str:
    depth = 0
    for at, one in enumerate(text):
        depth += {"(": 1, "<": 1, ")": -1, ">": -1}.get(one, 0)
        if one == "," and not depth:
            return f"({text[:at]})"
    return f"({text})"


def _runtime(directory: Path) -> Path:
    """The object of emulation.cpp, in `directory`."""
    made = directory / f"emulation-{_runtime_key()}.o"
    if not made.exists():
        with tempfile.TemporaryDirectory(dir=directory) as folder:
            unlinked = Path(folder, "emulation.o")
            _compile("-O3", "-march=native", "-c", str(_HERE / _PARTS[0]), "-o", str(unlinked))
            unlinked.replace(made)
    return made


@cache
def _runtime_key() -> str:
    """Stands for the emulator's sources, the compiler, and the processor that it compiles for."""
    line = [_required_compiler(), "-march=native", "-###", "-E", "-x", "c++", os.devnull]
    facts = subprocess.run(line, capture_output=True, check=False).stderr
    facts = b"\n".join(one for one in facts.splitlines() if b"/tmp/" not in one)
    parts = [(_HERE / name).read_bytes() for name in _PARTS]
    return hashlib.sha256(b"\0".join([*parts, facts])).hexdigest()[:24]


@cache
def _no_calls() -> tuple[str, ...]:
    """How the compiler is told not to report the entry of each function."""
    facts = subprocess.run([_required_compiler(), "--version"], capture_output=True, check=False)
    if b"clang" in facts.stdout:
        return ("-mllvm", "-tsan-instrument-func-entry-exit=0")
    return ("--param", "tsan-instrument-func-entry-exit=0")


def _compile(*arguments: str) -> None:
    _run(*_COMMON, *arguments)


def _run(*arguments: str) -> None:
    line = [_required_compiler(), *arguments]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EmulationError(f"the C++ compiler refuses the kernel:\n{done.stderr.strip()}")


def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, ("g++", "clang++"))), None)


def _required_compiler() -> str:
    found = _compiler()
    if found is None:
        raise PlatformError("CUDA kernels cannot be emulated: there is no g++ or clang++")
    return found


def kept() -> Path:
    """Where libraries are kept by default: a directory of this user."""
    return Path(tempfile.gettempdir(), f"bertile-emulated-{os.getuid()}")
