"""Keeps where a training is, so that one that was killed goes on as if it had not been."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bertile.base.errors import UsageError

STATE, ASKED = "state.pt", "run.json"


def begin(work: Path, asked: Mapping[str, Any]) -> None:
    """Make the directory of a run, or find that of the same; UsageError for that of another."""
    work.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asked, indent=2, sort_keys=True) + "\n"
    path = work / ASKED
    if not path.is_file():
        if any(work.iterdir()):
            raise UsageError(f"{work} holds other files", "choose another --work")
        path.write_text(text, encoding="utf-8")
    elif path.read_text(encoding="utf-8") != text:
        raise UsageError(
            f"{work} holds another run, of which the model, the data or the recipe differ",
            "remove it, or choose another --work",
        )


def save(work: Path, state: Mapping[str, Any]) -> None:
    """Put a state in the place of the one before, whole or not at all."""
    new = work / f"{STATE}.new"
    with new.open("wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, work / STATE)


def load(work: Path) -> dict[str, Any] | None:
    """The last state that was saved whole, None where there is none."""
    path = work / STATE
    if not path.is_file():
        return None
    return torch.load(path, map_location="cpu", weights_only=True)


def end(work: Path) -> None:
    """Remove a run's directory, whose result has been written."""
    shutil.rmtree(work)
