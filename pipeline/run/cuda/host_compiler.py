"""Compiles CUDA kernels for the CPU, by the host's C++ compiler and the words of emulation.h."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from importlib import util
from pathlib import Path

from bertile.base import scratch
from bertile.base.errors import BertileError, PlatformError

_HERE = Path(__file__).parent
_PARTS = (
    "emulation.cpp",
    "emulation.h",
    "emulation_memory.h",
    "emulation_tensor.h",
    "emulation_traffic.h",
    "emulation_wgmma.h",
)
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
    return None if _compiler() else "there is no C++ compiler (g++, clang++ or pip's ziglang)"


def build(source: str, directory: Path) -> Path:
    """A library of the entries of `source` (without prelude), kept in `directory` by content."""
    text = _host_text(source)
    name = hashlib.sha256("\0".join((_runtime_key(), text)).encode()).hexdigest()[:24]
    library = directory / f"kernels-{name}.so"
    if library.exists():
        return library
    runtime = _runtime(directory)
    with scratch.held(directory, "build-") as folder:
        unit, unlinked, linked = (Path(folder, f"kernels{end}") for end in (".cpp", ".o", ".so"))
        unit.write_text(text, encoding="utf-8")
        _compile(*_CHECKED, *_no_calls(), f"-I{_HERE}", "-c", str(unit), "-o", str(unlinked))
        _compile("-shared", "-Wl,-Bsymbolic", str(unlinked), str(runtime), "-o", str(linked), "-lm")
        linked.replace(library)
    return library


def _host_text(source: str) -> str:
    """The C++ unit for `source`: dynamic shared memory as a pointer, and one export per entry."""
    text = _DYNAMIC.sub(r"\1* const \2 = (\1*)emulated_shared_memory;", source)
    lines = [f"EMULATED_ENTRY({name}, {limit})" for name, limit in _entries(source).items()]
    return "\n".join(['#include "emulation.h"', text, *lines, ""])


def _entries(source: str) -> dict[str, str]:
    """The names of the entries and the thread limits of their launch bounds (C++, "0": none)."""
    limits: dict[str, str] = {}
    for match in _ENTRY.finditer(source):
        at, limit = match.end(), "0"
        bounds = re.compile(r"\s*__launch_bounds__\s*\(").match(source, at)
        if bounds:
            at = _closing(source, bounds.end())
            limit = _first_argument(source[bounds.end() : at - 1])
        name = re.compile(r"\s*(\w+)\s*\(").match(source, at)
        if name:
            limits[name[1]] = limit
    return limits


def _closing(text: str, at: int) -> int:
    """The position behind the parenthesis that closes the one open before `at`."""
    depth = 1
    while depth:
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        at += 1
    return at


def _first_argument(text: str) -> str:
    depth = 0
    for at, character in enumerate(text):
        depth += {"(": 1, "<": 1, ")": -1, ">": -1}.get(character, 0)
        if character == "," and not depth:
            return f"({text[:at]})"
    return f"({text})"


def _runtime(directory: Path) -> Path:
    """The object of emulation.cpp, in `directory`."""
    runtime = directory / f"emulation-{_runtime_key()}.o"
    if not runtime.exists():
        with scratch.held(directory, "build-") as folder:
            unlinked = Path(folder, "emulation.o")
            _compile("-O3", "-march=native", "-c", str(_HERE / _PARTS[0]), "-o", str(unlinked))
            unlinked.replace(runtime)
    return runtime


@cache
def _runtime_key() -> str:
    """Stands for the emulator's sources, the compiler, and the processor that it compiles for."""
    line = [*_required_compiler(), "-march=native", "-###", "-E", "-x", "c++", os.devnull]
    facts = subprocess.run(line, capture_output=True, check=False).stderr
    facts = b"\n".join(fact for fact in facts.splitlines() if b"/tmp/" not in fact)
    parts = [(_HERE / name).read_bytes() for name in _PARTS]
    return hashlib.sha256(b"\0".join([*parts, facts])).hexdigest()[:24]


@cache
def _no_calls() -> tuple[str, ...]:
    """How the compiler is told not to report the entry of each function."""
    facts = subprocess.run([*_required_compiler(), "--version"], capture_output=True, check=False)
    if b"clang" in facts.stdout:
        return ("-mllvm", "-tsan-instrument-func-entry-exit=0")
    return ("--param", "tsan-instrument-func-entry-exit=0")


def _compile(*arguments: str) -> None:
    line = [*_required_compiler(), *_COMMON, *arguments]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EmulationError(f"the C++ compiler refuses the kernel:\n{done.stderr.strip()}")


def _compiler() -> tuple[str, ...] | None:
    """The command of the host's compiler, else of pip's."""
    if path := next(filter(None, map(shutil.which, ("g++", "clang++"))), None):
        return (path,)
    return (sys.executable, "-m", "ziglang", "c++") if util.find_spec("ziglang") else None


def _required_compiler() -> tuple[str, ...]:
    command = _compiler()
    if command is None:
        raise PlatformError(
            "CUDA kernels cannot be emulated: there is no g++ or clang++",
            "install one, or: pip install ziglang",
        )
    return command


def kept() -> Path:
    """Where libraries are kept by default: a directory of this user, made where it is not there."""
    folder = Path(tempfile.gettempdir(), f"bertile-emulated-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise PlatformError(
            f"{folder} belongs to another user", "set TMPDIR to a place of your own"
        )
    return folder
