"""Builds a library in the place of the NVIDIA driver's (``fake_driver.c``)."""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
from pathlib import Path

from bertile.run.cuda import host_compiler

_HERE = Path(__file__).parent
_PARTS = ("fake_driver.c", "fake_image.h")
_FLAGS = ("-std=gnu11", "-O2", "-fPIC", "-fvisibility=hidden", "-shared", "-pthread")


def build_driver(directory: Path) -> Path:
    """The library, kept in `directory`.

    It runs the kernels of the library that the variable BERTILE_EMULATED_KERNELS names, which
    `host_compiler.build` made of the same source as the code that is loaded.
    """
    parts = [(_HERE / name).read_bytes() for name in _PARTS]
    library = directory / f"libcuda-{hashlib.sha256(b''.join(parts)).hexdigest()[:24]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=directory) as folder:
            linked = Path(folder, "libcuda.so")
            source = ("-x", "c", *_FLAGS, str(_HERE / _PARTS[0]))
            line = [*host_compiler._required_compiler(), *source, "-o", str(linked), "-ldl"]
            done = subprocess.run(line, capture_output=True, text=True, check=False)
            assert not done.returncode, done.stderr
            linked.replace(library)
    return library
