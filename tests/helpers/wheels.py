"""Makes wheels: Bertile's own, of a copy of the tree, and TVM's, with what a test says of them."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from bertile.loader import RUNTIME, find_runtime

ROOT = Path(__file__).parents[2]
LICENCES = {
    "apache_tvm-0.27.0.post1-py3-none-any.whl": (
        "tvm/LICENSE",
        "tvm/NOTICE",
        "tvm/licenses/LICENSE.builtin_fp16.txt",
    ),
    "apache_tvm_ffi-0.1.14.post1-py3-none-any.whl": (
        "apache_tvm_ffi-0.1.14.post1.dist-info/licenses/LICENSE",
        "apache_tvm_ffi-0.1.14.post1.dist-info/licenses/NOTICE",
        "tvm_ffi/3rdparty/libbacktrace/LICENSE",
    ),
}
LIBRARIES = ("tvm/lib/libtvm_runtime.so", "tvm_ffi/lib/libtvm_ffi.so")


def installed_libraries() -> dict[str, bytes]:
    """TVM's two libraries as they are here."""
    return {name: Path(path).read_bytes() for name, path in zip(RUNTIME, find_runtime())}


def tvm_wheels(
    directory: Path, libraries: Mapping[str, bytes], without: Iterable[str] = ()
) -> list[Path]:
    """Wheels as those of apache-tvm and apache-tvm-ffi, with these libraries."""
    directory.mkdir(parents=True, exist_ok=True)
    for (wheel, licences), library in zip(LICENCES.items(), LIBRARIES):
        with zipfile.ZipFile(directory / wheel, "w") as archive:
            for name in licences:
                if name not in without:
                    archive.writestr(name, f"the text of {name}")
            archive.writestr(library, libraries[library.rpartition("/")[2]])
    return sorted(directory.glob("*.whl"))


def build(directory: Path, folders: Iterable[str]) -> Path:
    """Bertile's wheel, built of a copy of these folders of the tree and of what stands beside."""
    copy = directory / "source"
    for name in ("pyproject.toml", "README.md", "LICENSE", *folders):
        _copy(ROOT / name, copy / name)
    line = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*line, "-w", str(directory), str(copy)], check=True)
    (wheel,) = directory.glob("bertile-*.whl")
    return wheel


def _copy(source: Path, target: Path) -> None:
    files = source.rglob("*") if source.is_dir() else [source]
    for file in files:
        if file.is_file() and "__pycache__" not in file.parts:
            path = target / file.relative_to(source) if source.is_dir() else target
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.read_bytes())
