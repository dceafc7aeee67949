"""`bertile cache` says where stage results lie and how much they take, and removes them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from bertile.base.cache import IN_USE_SECONDS, Cache
from bertile.cli import main


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    cache = Cache(tmp_path / "cache")
    for key, count in (("export.exporter-1", 1000), ("export.exporter-2", 2000), ("driver-1", 10)):
        cache.get_or_make(key, lambda path, count=count: (path / "x").write_bytes(b"x" * count))
    return cache.directory


def asked(capsys: pytest.CaptureFixture, *words: str) -> dict:
    assert main.main(["cache", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_cache_shows_place_size_and_stages(filled: Path, capsys: pytest.CaptureFixture) -> None:
    data = asked(capsys, "--cache-dir", str(filled))
    assert data["cache"] == str(filled)
    assert list(data["stages"]) == ["export.exporter", "driver"]
    assert data["stages"]["export.exporter"]["entries"] == 2
    assert 3000 < data["stages"]["export.exporter"]["bytes"] < 4000
    assert data["bytes"] == sum(stage["bytes"] for stage in data["stages"].values())
    assert main.main(["cache", "--cache-dir", str(filled)]) == 0
    assert str(filled) in capsys.readouterr().out


def test_clear_leaves_what_was_used_in_the_last_hour(
    filled: Path, capsys: pytest.CaptureFixture
) -> None:
    old = (filled / "driver-1").stat().st_mtime - 2 * IN_USE_SECONDS
    os.utime(filled / "driver-1", (old, old))
    data = asked(capsys, "clear", "--cache-dir", str(filled))
    assert not (filled / "driver-1").exists() and (filled / "export.exporter-1").exists()
    assert data["freed_bytes"] > 10 and data["left_bytes"] > 3000
    data = asked(capsys, "clear", "--all", "--cache-dir", str(filled))
    assert data["freed_bytes"] > 3000 and data["left_bytes"] == 0
    assert not (filled / "export.exporter-1").exists()


def test_cache_that_is_not_there_is_empty(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert asked(capsys, "--cache-dir", str(tmp_path / "none"))["bytes"] == 0
    assert asked(capsys, "clear", "--cache-dir", str(tmp_path / "none"))["freed_bytes"] == 0
    assert not (tmp_path / "none").exists()
