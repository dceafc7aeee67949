"""Holds what differs between kinds of machine, behind one protocol (`backends.backend.Backend`).

May import: `run` and what stands before it; `cpu` and `cuda` nothing of each other. A third kind of
machine is a folder here whose module `backend` has a `backend`, and a line in `of`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bertile.backends.backend import Backend
    from bertile.targets.rows import Target


def of(row: Target) -> Backend:
    """Who answers for a row's kind of machine: the only place that branches on it."""
    # By name, so that what depends on one kind of machine does not depend on the others: cache keys
    # and archives follow imports.
    kind = "cuda" if row.gpu else "cpu"
    return import_module(f"{__name__}.{kind}.backend").backend


def of_bundle(manifest: Mapping[str, Any]) -> Backend:
    """Who answers for the kind of machine that a bundle was made for."""
    from bertile.targets import rows

    return of(rows.resolve(manifest["target"]["name"]))
