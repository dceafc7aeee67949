"""Builds `bertile-run` and `libbertile.so` from the C loader's sources, for one target row."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from bertile.base.errors import BertileError
from bertile.targets.linker import link_command
from bertile.targets.rows import Target

SOURCES = Path(__file__).with_name("native")
COMMAND, LIBRARY = "bertile-run", "libbertile.so"
_FLAGS = ("-std=c11", "-O2", "-fPIC", "-fvisibility=hidden")
_LIBRARIES = ("-ldl", "-lpthread", "-lm")


def build(row: Target, directory: Path, compiler: Sequence[str] = (), *flags: str) -> None:
    """Compile the command and the library into `directory`, with the row's linker or `compiler`.

    BertileError with the compiler's last lines where it fails.
    """
    cc = [*(compiler or link_command(row)), *flags]
    directory = directory.absolute()  # which the compiler does not stand in
    objects = directory / "objects"
    objects.mkdir(parents=True)
    _run([*cc, *_FLAGS, f"-I{SOURCES}", "-c", *map(str, library_sources())], objects)
    library = sorted(objects.glob("*.o"))
    _run([*cc, *_FLAGS, f"-I{SOURCES}", "-c", *map(str, command_sources())], objects)
    command = sorted(objects.glob("*.o"))
    soname = ["-shared", f"-Wl,-soname,{LIBRARY}"]
    link = [*cc, "-s"] if not flags else cc  # with flags of its own it is for a debugger
    _run([*link, *soname, *map(str, library), "-o", str(directory / LIBRARY), *_LIBRARIES], objects)
    _run([*link, *map(str, command), "-o", str(directory / COMMAND), *_LIBRARIES], objects)
    shutil.rmtree(objects)


def library_sources() -> list[Path]:
    """What libbertile is made of."""
    return sorted(path for path in SOURCES.glob("*.c") if path.name != "example.c")


def command_sources() -> list[Path]:
    """What bertile-run has beside it."""
    return sorted((SOURCES / "command").glob("*.c"))


def copy_sources(directory: Path) -> None:
    """Put headers, sources and build files into `directory`, and a pkg-config file for it.

    That file finds the library in the directory `runtime` beside `directory`.
    """
    for path in sorted(SOURCES.rglob("*")):
        if path.suffix in (".c", ".h", ".hpp", ".in", ".txt"):
            place = directory / path.relative_to(SOURCES)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
    text = (SOURCES / "bertile.pc.in").read_text(encoding="utf-8")
    places = {"prefix": "${pcfiledir}/..", "libdir": "${prefix}/runtime"}
    places |= {"includedir": f"${{prefix}}/{directory.name}", "PROJECT_VERSION": "1.0.0"}
    for name, value in places.items():
        text = text.replace(f"@{name}@", value)
    (directory / "bertile.pc").write_text(text, encoding="utf-8")


def _run(command: list[str], directory: Path) -> None:
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = " ".join(done.stderr.split())[-500:]
        raise BertileError(f"{' '.join(command[:4])} … cannot compile the C loader: {reason}")
