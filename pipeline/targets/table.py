"""Prints the rows as `bertile targets` shows them, with those that this machine can run."""

from __future__ import annotations

from collections.abc import Collection

from bertile.base.tables import table
from bertile.targets.rows import TABLE


def as_text(runs: Collection[str], best: str | None) -> str:
    """A table of all rows; `runs` are the names of those for this machine, `best` its native."""
    header = ("target", "arch", "vector bits", "registers", "dot product", "bf16", "runs here")
    rows = [
        (
            row.name,
            row.arch,
            None if row.gpu else row.vector_bits,
            None if row.gpu else row.registers,
            row.dot_product,
            "yes" if row.bf16 else None,
            "native" if row.name == best else "yes" if row.name in runs else "no",
        )
        for row in TABLE
    ]
    return table(header, rows)
