"""Writes down what a training comes to, step by step, as CSV and for TensorBoard."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from bertile.base.errors import require

COLUMNS = ("step", "loss", "rate", "zeros", "metric")
FILE = "steps.csv"


class Record:
    """Appends to `directory`; what an interrupted run wrote behind `step` is written again."""

    def __init__(self, directory: Path, step: int) -> None:
        self.path = directory / FILE
        kept = [row for row in read(self.path) if int(row["step"]) <= step]
        with self.path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(kept)
        require("train", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(
            str(directory / "tensorboard"), purge_step=step + 1 if step else None
        )

    def add(self, step: int, **values: float | None) -> None:
        """A row; a value that is None stays empty."""
        row: dict[str, Any] = {"step": step}
        for name, value in values.items():
            if value is not None:
                row[name] = f"{value:.6g}"
                self.board.add_scalar(name, value, step)
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, COLUMNS, restval="").writerow(row)

    def close(self) -> None:
        """Finish the files."""
        self.board.close()


def read(path: Path) -> list[dict[str, str]]:
    """The whole rows of the CSV; none where there is no such file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if row["step"] and row["metric"] is not None]
