"""Compiles BERT-family encoders into small native libraries; names load on first use."""

from __future__ import annotations

__all__ = ["Config", "__version__", "compile", "load"]

_HOMES = {"compile": "driver", "load": "loader", "Config": "config"}


def __getattr__(name: str):
    # lazy: `import bertile` and `bertile --help` must not pay for TVM or numpy
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("bertile")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
