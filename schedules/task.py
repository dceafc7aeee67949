"""Names what one kernel computes: an operation and its shape. Goes into the tuning log as the key,
and to a schedule as the order.

A task says nothing of how (register tiles, loop order): that is the schedule's knobs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

ShapeValue = int | float | str | bool


@dataclass(frozen=True)
class Task:
    """An operation with its static shape; the number of tokens is never part of it.

    >>> Task("dense", {"inputs": 768, "outputs": 3072, "activation": "gelu"}).name
    'dense_768_3072_gelu'
    """

    operation: str
    shape: Mapping[str, ShapeValue] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The canonical spelling: equal for equal tasks, whatever the order of the shape's keys."""
        return json.dumps([self.operation, dict(self.shape)], sort_keys=True)

    @property
    def name(self) -> str:
        """A readable identifier, e.g. ``attention_12_64_bias``: flags by name, values as is."""
        words = [self.operation]
        for key, value in self.shape.items():
            if value is True:
                words.append(key)
            elif value not in (False, "none"):
                words.append(f"{value:g}" if isinstance(value, float) else str(value))
        return "_".join(words).replace(".", "p").replace("-", "m")

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Task) and self.key == other.key
