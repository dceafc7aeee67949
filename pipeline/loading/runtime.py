"""Finds TVM's two runtime libraries, and opens them once for the process."""

from __future__ import annotations

import os
import threading
from importlib.util import find_spec
from pathlib import Path

from bertile.loading.errors import PlatformError
from bertile.loading.files import sha256
from bertile.loading.tvm_abi import Runtime

RUNTIME = ("libtvm_ffi.so", "libtvm_runtime.so")  # in the order in which they are loaded
# Where they lie: `import tvm` must find its own already loaded, so those come first.
_PACKAGES = (("tvm_ffi", "tvm"), ("bertile_runtime", "bertile_runtime"))
_process: dict[str, Runtime] = {}
_process_lock = threading.Lock()


def open_runtime(root: Path, files: dict) -> Runtime:
    """Return the runtime of this process, opened once: a second copy would end the process."""
    with _process_lock:
        if "runtime" not in _process:
            hashes = [files.get(f"runtime/{name}", {}).get("sha256") for name in RUNTIME]
            own = [str(root / "runtime" / name) for name in RUNTIME] if all(hashes) else None
            try:
                # with the same version installed, `import tvm` must find these already loaded
                shared = find_runtime()
                if own and shared[0] not in _mapped_libraries().values():
                    shared = shared if [sha256(Path(path)) for path in shared] == hashes else own
            except PlatformError:
                if not own:
                    raise
                shared = own
            _process["runtime"] = Runtime(*shared)
        return _process["runtime"]


def find_runtime() -> tuple[str, str]:
    """Return the paths of libtvm_ffi and libtvm_runtime, without importing what they belong to.

    What the process has loaded already comes first, then the packages apache-tvm-ffi and
    apache-tvm, then bertile-runtime, which has both. Raises PlatformError where one of the two is
    missing.
    """
    loaded = _mapped_libraries()
    for packages in _PACKAGES:
        pairs = zip(packages, RUNTIME)
        paths = [loaded.get(name) or _package_library(package, name) for package, name in pairs]
        if paths[0] and paths[1]:
            return paths[0], paths[1]
    raise PlatformError(
        "the TVM runtime libraries are missing",
        "install them with: pip install 'bertile[runtime]', or compile without --no-runtime",
    )


def _mapped_libraries() -> dict[str, str]:
    try:
        lines = Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return {}
    paths = {line.split(None, 5)[-1] for line in lines if line.endswith(RUNTIME)}
    return {os.path.basename(path): path for path in paths if os.path.basename(path) in RUNTIME}


def _package_library(package: str, library: str) -> str | None:
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None:
        return None
    path = os.path.join(os.path.dirname(spec.origin), "lib", library)
    return path if os.path.isfile(path) else None
