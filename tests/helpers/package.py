"""Puts the package together from its three folders, as an installation would, for other pythons."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]


def linked(place: Path) -> Path:
    """A directory for PYTHONPATH in which `bertile` is made of links to this tree."""
    package = place / "bertile"
    package.mkdir(parents=True)
    for entry in (*(ROOT / "pipeline").iterdir(), ROOT / "schedules", ROOT / "tuning_logs"):
        if entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    return place
