"""Defines the errors that Bertile raises: what happened, what to do, the command's exit code."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType

from bertile.loading.errors import BertileError, BundleError, InputError, PlatformError

__all__ = [
    "BertileError",
    "BundleError",
    "InputError",
    "MissingExtraError",
    "ModelError",
    "NumericMismatchError",
    "PlatformError",
    "UsageError",
    "nearest",
    "require",
]


class UsageError(BertileError):
    """An option, name or value that Bertile does not know."""

    exit_code = 2


class ModelError(BertileError):
    """A model file that cannot be read, or that uses something unsupported."""


class MissingExtraError(BertileError):
    """A stage was asked for whose optional packages are not installed."""

    exit_code = 3


class NumericMismatchError(BertileError):
    """The compiled model differs from its reference by more than its precision allows."""

    exit_code = 4


LISTED = 20  # names that a sentence can hold


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'? known: a, b, c", to be put behind "… 'y' is unknown".

    The question is left out where nothing is near, the list where nothing is known; of a long list
    the first are named.
    """
    names = [str(choice) for choice in known]
    folded = {choice.casefold(): choice for choice in reversed(names)}
    close = difflib.get_close_matches(str(name).casefold(), list(folded), n=1)
    question = f" did you mean '{folded[close[0]]}'?" if close else ""
    more = f", and {len(names) - LISTED} more" if len(names) > LISTED else ""
    listing = f" known: {', '.join(names[:LISTED])}{more}" if names else ""
    return f";{question}{listing}" if question or listing else ""


def require(extra: str, *modules: str) -> tuple[ModuleType, ...]:
    """Import `modules` and return them, or name the one that is missing and the extra it is in."""
    imported = []
    for module in modules:
        try:
            imported.append(importlib.import_module(module))
        except ImportError as error:
            package = module.partition(".")[0]
            absent = isinstance(error, ModuleNotFoundError) and error.name == package
            what = f"needs the package {package}" if absent else f"cannot import {module}: {error}"
            raise MissingExtraError(
                f"this step {what}", f"install it with: pip install 'bertile[{extra}]'"
            ) from error
    return tuple(imported)
