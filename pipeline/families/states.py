"""Reads what became of a tiny model of each model type of transformers, as it was last tried.

`python -m bertile.studies.model_types` writes the file, a JSON object a line.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bertile.families import table

PATH = Path(__file__).with_name("model_types.jsonl")
OWN, GENERAL, REFUSED = "own", "general", "refused"  # the states


def read(path: Path = PATH) -> dict[str, dict[str, Any]]:
    """The rows of a file by their types, of which the last counts; {} without a file.

    A row has "type" and "state"; "reason" where it was refused; else "median" and "largest", errors
    relative to the largest value of an output, and "operators" that TVM's kernels compute.
    """
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    return {row["type"]: row for row in map(json.loads, filter(None, lines))}


def roads() -> list[dict[str, Any]]:
    """Every type with a row, with its family and heads, and behind them every other that was tried.

    A type that stands in neither goes the general road, as far as its operators are known.
    """
    tried = read()
    own = [
        {"type": name, "state": OWN, "family": family.name, "heads": list(family.heads)}
        for family in table.FAMILIES
        for name in family.model_types
    ]
    owned = {row["type"] for row in own}
    others = [tried[name] for name in sorted(tried) if name not in owned]
    return [{**tried.get(row["type"], {}), **row} for row in own] + others
