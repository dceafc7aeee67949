"""Lists the operators that are evaluated at build time where all their operands are weights.

Only what is computed by these counts as a weight: a kernel could not get any other packed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def _extents(call: Any) -> list[int]:
    return [int(extent) for extent in call.ty.shape]


# Attributes are looked up as the operator's call has them.
FOLDED: dict[str, Callable[..., np.ndarray]] = {
    "relax.concat": lambda call, parts: np.concatenate(parts, axis=int(call.attrs["axis"])),
    "relax.permute_dims": lambda call, x: np.transpose(
        x, [int(a) for a in call.attrs["axes"]] if call.attrs["axes"] is not None else None
    ),
    "relax.reshape": lambda call, x, _shape: x.reshape(_extents(call)),
    "relax.expand_dims": lambda call, x: x.reshape(_extents(call)),
    "relax.squeeze": lambda call, x: x.reshape(_extents(call)),
    "relax.add": lambda call, a, b: a + b,
    "relax.subtract": lambda call, a, b: a - b,
    "relax.multiply": lambda call, a, b: a * b,
    "relax.divide": lambda call, a, b: a / b,
}
