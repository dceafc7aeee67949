"""Imports TVM without torch, which takes longer to import than TVM itself.

TVM's foreign function interface imports torch wherever that is installed, to take and give tensors
of torch's. Bertile gives it arrays of numpy alone. A process that has imported either keeps what it
has; one that imports torch later gets it as ever. ``from bertile.base.tvm_alone import tvm`` is for
modules that need TVM wherever they are imported.
"""

from __future__ import annotations

import sys
from types import ModuleType

from bertile.base.errors import require


def load() -> ModuleType:
    """Import TVM and return it. Raises MissingExtraError where it is not installed."""
    hides = "torch" not in sys.modules and "tvm_ffi" not in sys.modules
    if hides:
        sys.modules["torch"] = None  # type: ignore[assignment]  # Python's word for: not to be had
    try:
        (tvm,) = require("compile", "tvm")
    finally:
        if hides:
            del sys.modules["torch"]
    return tvm


def __getattr__(name: str) -> ModuleType:
    if name == "tvm":
        return load()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
