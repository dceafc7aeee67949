"""Makes the requests that engines are timed on: of one size, of mixed lengths, or of a file."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bertile.base.errors import UsageError
from bertile.bench.engines import Arrays
from bertile.onnx.exported import ExportedModel
from bertile.quantize import calibration
from bertile.run.requests import padded_inputs, random_inputs

# Sequences of mixed lengths: enough that every twentieth of the distribution is among them thrice.
SEQUENCES = 64
LEAST_REQUESTS = 4
SEED = 7
LIKE = "write it like 8-128 or 16:0.5,128:0.5"


@dataclass(frozen=True)
class Mix:
    """Lengths of sequences in tokens, and the share of each; `text` is how the user wrote it."""

    text: str
    lengths: tuple[int, ...]
    shares: tuple[float, ...]

    def draw(self, requests: int, batch: int) -> np.ndarray:
        """Lengths (requests, batch) in a random order, the same every time.

        Together they have the shares of the mix, and so has each request as nearly as it can: of
        `batch` equal parts of the distribution it has one length each.
        """
        places = (np.arange(requests * batch) + 0.5) / (requests * batch)
        index = np.searchsorted(np.cumsum(self.shares), places)
        lengths = np.array(self.lengths)[np.minimum(index, len(self.lengths) - 1)]
        random = np.random.default_rng(SEED)
        parts = random.permuted(lengths.reshape(batch, requests), axis=1)
        return random.permuted(parts.T, axis=1)


@dataclass(frozen=True)
class Workload:
    """Requests of one kind, sent in turn: `batch` sequences each, `length` as a table shows it."""

    batch: int
    length: int | str
    requests: tuple[Arrays, ...]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(sequences, tokens of each) of the first request, without padding."""
        arrays = self.requests[0]
        batch, width = next(iter(arrays.values())).shape
        mask = arrays.get("attention_mask")
        if mask is None or mask.all():
            return [(batch, width)]
        return [(1, int(length)) for length in mask.sum(axis=1)]

    @property
    def of_each_shape(self) -> tuple[Arrays, ...]:
        """One request of each shape among them."""
        by_shape = {next(iter(arrays.values())).shape: arrays for arrays in self.requests}
        return tuple(by_shape.values())

    @property
    def tokens(self) -> float:
        """Of a request, without padding, on average over all requests."""
        counts = [
            int(arrays["attention_mask"].sum())
            if "attention_mask" in arrays
            else next(iter(arrays.values())).size
            for arrays in self.requests
        ]
        return sum(counts) / len(counts)


def parse_mix(text: str) -> Mix:
    """Read ``8-128`` (all lengths alike) or ``16:0.5,128:0.5`` (shares, in any unit).

    Raises UsageError for anything else.
    """
    shares: dict[int, float] = {}
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?(?::(\d+(?:\.\d*)?|\.\d+))?", part)
        if match is None:
            raise UsageError(f"--lengths has '{part}'", LIKE)
        first, last = int(match[1]), int(match[2] or match[1])
        if not 0 < first <= last:
            raise UsageError(f"--lengths has '{part}', which is not a range from 1 up", LIKE)
        weight = float(match[3] or 1)
        for length in range(first, last + 1):
            shares[length] = shares.get(length, 0.0) + weight / (last - first + 1)
    total = math.fsum(shares.values())
    if not total > 0:
        raise UsageError(f"the shares of --lengths {text} are all 0", LIKE)
    lengths = sorted(shares)
    return Mix(text, tuple(lengths), tuple(shares[length] / total for length in lengths))


def of_size(manifest: dict[str, Any], batch: int, length: int) -> Workload:
    """One request of random ids, without padding."""
    return Workload(batch, length, (random_inputs(manifest, batch, length),))


def of_mix(manifest: dict[str, Any], batch: int, mix: Mix) -> Workload:
    """Requests of random ids, each padded to its longest sequence.

    Raises UsageError for a model that cannot be given padding, where a request would have some.
    """
    count = max(SEQUENCES // batch, LEAST_REQUESTS)
    requests = tuple(padded_inputs(manifest, row) for row in mix.draw(count, batch))
    return Workload(batch, mix.text, requests)


def of_file(path: Path, exported: ExportedModel, batch: int) -> Workload:
    """The texts (one a line) or arrays (.npz of the model's inputs) of a file, in their order.

    Raises what `calibration.read_rows` raises.
    """
    rows = calibration.read_rows(path, exported)
    groups = [rows[first : first + batch] for first in range(0, len(rows), batch)]
    return Workload(
        batch, path.name, tuple(calibration.joined(group, exported) for group in groups)
    )
