"""Packs TVM's two runtime libraries into a wheel of their own, `bertile-runtime`, of some MB.

They come out of the pinned wheels of apache-tvm and apache-tvm-ffi, which are 100 MB large, with
the licences of all that is in them. ``python -m bertile.bundle.runtime_wheel -o dist`` writes it.
"""

from __future__ import annotations

import base64
import hashlib
import sys
import zipfile
from argparse import ArgumentParser
from collections.abc import Mapping
from pathlib import Path

from bertile.base import scratch
from bertile.base.errors import BertileError
from bertile.bundle import runtime_libraries
from bertile.loader import RUNTIME

PACKAGE = "bertile_runtime"
# Which licences of which wheel: of the libraries, and of what is linked into them.
_LICENCES = {
    "apache_tvm-": ("tvm/LICENSE", "tvm/NOTICE", "tvm/licenses/LICENSE.builtin_fp16.txt"),
    "apache_tvm_ffi-": (
        "licenses/LICENSE",
        "licenses/NOTICE",
        "tvm_ffi/3rdparty/libbacktrace/LICENSE",
    ),
}
_ABOUT = (
    f'"""Holds {" and ".join(RUNTIME)}, out of the wheels of Apache TVM;'
    ' bertile.load finds them here."""\n'
)
_METADATA = """\
Metadata-Version: 2.4
Name: bertile-runtime
Version: {version}
Summary: The two libraries of Apache TVM that run a bundle of Bertile.
License-Expression: Apache-2.0 AND BSD-3-Clause AND Apache-2.0 WITH LLVM-exception
{licences}
Requires-Python: >=3.10
Description-Content-Type: text/plain

libtvm_runtime.so of apache-tvm {version} and libtvm_ffi.so of apache-tvm-ffi {ffi}, unchanged, for
{arch}. Nothing else of TVM is here: it is what `pip install 'bertile[runtime]'` brings.
"""


def write(wheels: list[Path], arch: str, output: Path) -> Path:
    """Write the wheel for `arch` into the directory `output`; the same wheels give the same bytes.

    `wheels` are those of apache-tvm and apache-tvm-ffi. Raises BertileError where a library, or a
    licence, is missing or of another machine.
    """
    tvm, ffi = (_of(wheels, name) for name in _LICENCES)
    version, ffi_version = (wheel.name.split("-")[1] for wheel in (tvm, ffi))
    info = f"{PACKAGE}-{version}.dist-info"
    files = {f"{PACKAGE}/__init__.py": _ABOUT.encode()}
    with scratch.directory() as directory:
        runtime_libraries.extract(wheels, directory, arch)
        for name in RUNTIME:
            files[f"{PACKAGE}/lib/{name}"] = (directory / name).read_bytes()
    texts = {**_licences(tvm, "apache_tvm-"), **_licences(ffi, "apache_tvm_ffi-")}
    files |= {f"{info}/licenses/{name}": text for name, text in texts.items()}
    listed = "\n".join(f"License-File: {name}" for name in texts)
    about = _METADATA.format(version=version, ffi=ffi_version, arch=arch, licences=listed)
    files[f"{info}/METADATA"] = about.encode()
    platform = f"manylinux_2_28_{arch}"  # what both wheels are for
    tag = f"py3-none-{platform}"
    files[f"{info}/WHEEL"] = (
        f"Wheel-Version: 1.0\nGenerator: {__name__}\nRoot-Is-Purelib: false\nTag: {tag}\n"
    ).encode()
    files[f"{info}/RECORD"] = _record(files, f"{info}/RECORD")
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{PACKAGE}-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.external_attr = (0o755 if name.endswith(".so") else 0o644) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
    return path


def _of(wheels: list[Path], name: str) -> Path:
    for wheel in wheels:
        if wheel.name.startswith(name):
            return wheel
    raise BertileError(f"no wheel {name}*.whl was given", "give those of both packages")


def _licences(wheel: Path, name: str) -> dict[str, bytes]:
    """The licences in a wheel, by the names that they get."""
    texts = {}
    with zipfile.ZipFile(wheel) as archive:
        for wanted in _LICENCES[name]:
            inside = [path for path in archive.namelist() if path.endswith(wanted)]
            if not inside:
                raise BertileError(
                    f"{wheel.name} has no {wanted}", "look where its licence lies now"
                )
            folder, _, file = wanted.rpartition("/")
            part = "libbacktrace-" if folder.endswith("libbacktrace") else ""
            texts[f"{name}{part}{file}".replace("_", "-")] = archive.read(inside[0])
    return texts


def _record(files: Mapping[str, bytes], own: str) -> bytes:
    """The RECORD of a wheel: hash and size of each file, as PEP 376 has it."""
    lines = []
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(data)}\n")
    return "".join([*lines, f"{own},,\n"]).encode()


def main(arguments: list[str] | None = None) -> int:
    """Fetch the pinned wheels, write ours, print its path."""
    parser = ArgumentParser(prog=f"python -m {__spec__.name}", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("dist"), metavar="DIR")
    parser.add_argument("--arch", choices=tuple(runtime_libraries.PINS), default="x86_64")
    parser.add_argument(
        "--wheels", type=Path, metavar="DIR", help="those of TVM (default: fetched)"
    )
    options = parser.parse_args(arguments)
    with scratch.directory() as folder:
        wheels = options.wheels or runtime_libraries.download(options.arch, folder)
        print(write(sorted(wheels.glob("*.whl")), options.arch, options.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
