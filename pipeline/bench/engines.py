"""Describes the engines of a benchmark: which runs what, and where it finds the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bertile.base.errors import BertileError

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Source:
    """Where an engine finds the model: all are the same weights."""

    bundle: Path
    onnx: Path | None = None  # the canonical ONNX file, or the form of it that the engine takes
    model: str = ""  # what the user called MODEL
    head: str | None = None  # as the manifest says it
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Engine:
    """One line of a comparison."""

    name: str  # as the user gives it and the tables show it: "openvino", "openvino:bf16", a path
    kind: str  # a name that `peers` opens
    precision: str
    source: Source
    streams: int = 1  # calls that it answers at once; the threads are divided among them


class LeftOut(BertileError):
    """A peer that cannot be had here: a sentence for the benchmark's notes, no reason to fail."""
