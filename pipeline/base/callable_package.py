"""Makes a package answer a call, so that `bertile.bench` is both a folder and a function."""

from __future__ import annotations

import functools
import sys
from importlib import import_module
from types import ModuleType
from typing import Any


def callable_package(package: str, module: str, function: str) -> None:
    """Let a call of the imported `package` go to `function` of its `module`, loaded on first use.

    An attribute of the package's parent cannot do it: whatever imports the package sets that
    attribute to the module once more.
    """

    def target() -> Any:
        return getattr(import_module(f"{package}.{module}"), function)

    class CallablePackage(ModuleType):
        def __call__(self, *args: Any, **options: Any) -> Any:
            return target()(*args, **options)

        @functools.cached_property
        def __wrapped__(self) -> Any:  # where inspect.signature looks
            return target()

    sys.modules[package].__class__ = CallablePackage
