"""Reads what a text costs beside time: joules where a gauge can be read, and bytes of weights.

A gauge is RAPL's of the processor's packages, or a battery's. Both count the whole machine: nothing
else should run.
"""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Callable, Collection
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
SUPPLIES = Path("/sys/class/power_supply")


class Gauge:
    """Counts joules; `name` says by what."""

    def __init__(self, name: str, read: Callable[[], float], wraps: float | None = None) -> None:
        self.name, self._read, self._wraps = name, read, wraps
        self._began = read()

    def joules(self) -> float:
        """Since the last call, or since it was made."""
        now = self._read()
        spent = now - self._began
        if spent < 0 and self._wraps:
            spent += self._wraps
        self._began = now
        return spent


def gauge(powercap: Path = POWERCAP, supplies: Path = SUPPLIES) -> Gauge | None:
    """What can be read here, None where nothing can."""
    packages = []
    for path in sorted(powercap.glob("intel-rapl:*")):
        if path.name.count(":") == 1 and _number(path / "energy_uj") is not None:
            packages.append(path)
    if packages:
        wraps = sum(_number(path / "max_energy_range_uj") or 0.0 for path in packages) * 1e-6
        return Gauge(
            "RAPL",
            lambda: sum(_number(path / "energy_uj") or 0.0 for path in packages) * 1e-6,
            wraps or None,
        )
    for path in sorted(supplies.glob("*/energy_now")):
        if _number(path) is not None:  # microwatt hours, which fall
            return Gauge("battery", lambda path=path: -(_number(path) or 0.0) * 3.6e-3)
    return None


def why_not(powercap: Path = POWERCAP) -> str:
    """What to say where no gauge can be read."""
    if any(powercap.glob("intel-rapl:*")):
        return "joules are not known: RAPL can be read by root alone here"
    return "joules are not known: this machine shows neither RAPL nor a battery"


def _number(path: Path) -> float | None:
    with contextlib.suppress(OSError, ValueError):
        return float(path.read_text())
    return None


def weight_bytes(bundle: Path, among: Collection[str] | None = None) -> int:
    """How many bytes of weights a request of a bundle reads, of all or `among` those of some names:
    all but the tables of embeddings, of which it reads a row a token.
    """
    with (bundle / "params.safetensors").open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    spans = [
        entry["data_offsets"] + [name] for name, entry in header.items() if name != "__metadata__"
    ]
    return sum(
        end - start
        for start, end, name in spans
        if "embedding" not in name and (among is None or name in among)
    )
