"""Ranges are read from the package's metadata, and versions compared with them as pip would."""

from __future__ import annotations

import pytest
from packaging.requirements import Requirement

from bertile.base import version_ranges
from bertile.base.version_ranges import VersionRange

VERSIONS = ("0.9", "1.22.0", "1.22", "1.26.4", "1.100", "2.0.0", "2.4.6+cpu", "2.13.0.post1", "3.0")


@pytest.mark.parametrize("bounds", [">=1.22,<3", ">=1.26.4,<2", ">=2,<2.13", "==1.26.4", "==3.0"])
@pytest.mark.parametrize("version", VERSIONS)
def test_range_holds_what_packaging_says(bounds: str, version: str) -> None:
    want = Requirement(f"numpy{bounds}").specifier.contains(version)
    assert VersionRange("numpy", bounds).holds(version) == want


def test_ranges_are_those_of_the_metadata() -> None:
    numpy = VersionRange("numpy", ">=1.22,<3")
    assert version_ranges.packages() == (numpy,) and str(numpy) == "numpy>=1.22,<3"
    asked = version_ranges.packages("export")
    assert [tried.package for tried in asked][:2] == ["torch", "transformers"]
    assert all(tried.extra == "export" and ">=" in tried.bounds for tried in asked)
    assert version_ranges.packages("no-such-extra") == ()


def test_pythons_are_in_order() -> None:
    assert version_ranges.pythons()[:2] == ("3.10", "3.11")


def test_gpu_build_stands_in_for_that_of_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version_ranges, "_installed", {"xgboost": "3.1.0"}.get)
    assert VersionRange("xgboost-cpu", ">=3,<4").version() == "3.1.0"
    assert VersionRange("xgboost", ">=3,<4").version() == "3.1.0"
    assert VersionRange("onnx", ">=1,<2").version() is None
