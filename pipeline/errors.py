"""Gives Bertile's errors their public name: `from bertile.errors import BertileError`."""

from __future__ import annotations

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

__all__ = [
    "BertileError",
    "BundleError",
    "InputError",
    "MissingExtraError",
    "ModelError",
    "NumericMismatchError",
    "PlatformError",
    "UsageError",
]
