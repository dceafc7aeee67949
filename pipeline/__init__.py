"""Compiles BERT-family encoders into small native libraries; names load on first use.

In short::

    import bertile

    bertile.compile("minilm", "out/minilm", precision="int8")
    with bertile.open("out/minilm") as model:
        vectors = model.encode(["A first sentence.", "A second one."])

`compile`, `verify` and `bench` do what the commands of these names do; `open` takes texts, `load`
takes ids and needs numpy alone.
Errors are subclasses of `BertileError`; what happens is logged under "bertile".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bertile.base.errors import (
        BertileError,
        BundleError,
        InputError,
        MissingExtraError,
        ModelError,
        NumericMismatchError,
        PlatformError,
        UsageError,
    )
    from bertile.base.progress import Progress
    from bertile.bench.benchmark import bench
    from bertile.config import Config
    from bertile.driver import compile
    from bertile.loader import Model, load
    from bertile.text.opening import open
    from bertile.verify.verifier import verify

    __version__: str

__all__ = [
    "BertileError",
    "BundleError",
    "Config",
    "InputError",
    "MissingExtraError",
    "Model",
    "ModelError",
    "NumericMismatchError",
    "PlatformError",
    "Progress",
    "UsageError",
    "__version__",
    "bench",
    "compile",
    "load",
    "open",
    "verify",
]

_HOMES = {
    "compile": "driver",
    "Config": "config",
    "load": "loader",
    "open": "text.opening",
    "Model": "loader",
    "Progress": "base.progress",
    "BertileError": "loading.errors",
    "BundleError": "loading.errors",
    "InputError": "loading.errors",
    "PlatformError": "loading.errors",
    "MissingExtraError": "base.errors",
    "ModelError": "base.errors",
    "NumericMismatchError": "base.errors",
    "UsageError": "base.errors",
}
# Modules that are there without an import; the two folders among them can be called.
_MODULES = ("bench", "errors", "loader", "ray", "text", "verify")


if not TYPE_CHECKING:  # which is told above what there is, so that a wrong name is an error

    def __getattr__(name: str) -> Any:
        # lazy: `import bertile` and `bertile --help` must not pay for TVM or numpy
        from importlib import import_module

        if name in _MODULES:
            return import_module(f"{__name__}.{name}")
        if name in _HOMES:
            return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        if name == "__version__":
            from importlib.metadata import version

            return version("bertile")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
