"""Knows which versions Bertile is tried with, from its own metadata, and which are here.

pyproject.toml is the place where ranges stand; an installed package has them as its requirements.
Read by a few lines instead of `packaging`, which need not be there: who looks at an installation
that is broken must not depend on it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from importlib import metadata

from bertile.base.errors import PlatformError

# The same module by another package, which may stand in for what an extra asks for.
_STAND_INS = {"xgboost-cpu": "xgboost"}
_REQUIREMENT = re.compile(r"([\w.-]+)([<>=\d.,\w]*)(?:; extra == [\"'](\w+)[\"'])?")
_BOUND = re.compile(r"(>=|<|==)([\w.]+)")


@dataclasses.dataclass(frozen=True)
class VersionRange:
    """A package, its bounds as pip writes them, and the extra that asks for it, "" for none."""

    package: str
    bounds: str
    extra: str = ""

    def version(self) -> str | None:
        """What is installed of it, or of its stand-in; None for nothing."""
        return _installed(self.package) or _installed(_STAND_INS.get(self.package, self.package))

    def holds(self, version: str) -> bool:
        """Whether a version lies within; to a pin it is equal letter by letter."""
        return all(_within(version, *bound) for bound in _BOUND.findall(self.bounds))

    def __str__(self) -> str:
        return f"{self.package}{self.bounds}"


def packages(extra: str = "") -> tuple[VersionRange, ...]:
    """What an extra itself asks for, in its order, without the extras that it brings along."""
    ranges = _read(_about().get_all("Requires-Dist") or ())
    return tuple(tried for tried in ranges if tried.extra == extra)


def pythons() -> tuple[str, ...]:
    """The versions of Python, as "3.11", in order."""
    classifiers = _about().get_all("Classifier") or ()
    return tuple(
        re.findall(r"Programming Language :: Python :: (3\.\d+)$", "\n".join(classifiers), re.M)
    )


def _about() -> metadata.PackageMetadata:
    try:
        return metadata.metadata("bertile")
    except metadata.PackageNotFoundError as error:
        raise PlatformError(
            "bertile is not installed", "install it with: pip install -e ."
        ) from error


def _read(requirements: Sequence[str]) -> list[VersionRange]:
    """Plain requirements; those of Bertile's own extras ("bertile[run]") are left out."""
    matches = [_REQUIREMENT.fullmatch(line) for line in requirements if "[" not in line]
    return [
        VersionRange(match[1], _in_order(match[2]), match[3] or "") for match in matches if match
    ]


def _in_order(bounds: str) -> str:
    """The lower bound first: metadata has "<3,>=1.26"."""
    return ",".join(sorted(bounds.split(","), key=lambda bound: bound.startswith("<")))


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _within(version: str, relation: str, bound: str) -> bool:
    if relation == "==":
        return version.partition("+")[0] == bound  # "+cpu" says who built it
    here, limit = _numbers(version), _numbers(bound)
    return here >= limit if relation == ">=" else here < limit


def _numbers(version: str) -> tuple[int, ...]:
    """The release, (2, 13) of "2.13.0+cpu": zeros at the end say nothing."""
    leading = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in leading[0].split(".")] if leading else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)
