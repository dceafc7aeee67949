"""An engine that divides, for workers in processes of their own to open."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from bertile.bench.engines import Engine


def opened(engine: Engine, threads: int) -> tuple[Callable[[int], float], str]:
    """It divides 12 by what it is called with."""
    return lambda number: 12 / number, f"{engine.name} with {threads} threads"


def applied(infer: Callable[[int], float], number: int) -> tuple[float, Any]:
    """What the engine says of a number, and the process in which it does."""
    return infer(number), os.getpid()
