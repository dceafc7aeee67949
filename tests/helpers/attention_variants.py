"""Lists the variants of attention, one row each, that all its tests are parametrised by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tvm import relax
from tvm.relax import op

from bertile.schedules.attention_spec import AttentionSpec


@dataclass(frozen=True)
class Variant:
    """``fields`` are those of its spec beside the sizes. ``sees`` says the same for query i and key
    j, of any arrays; ``closed`` is the canonical comparison of j - i that closes a key to a query,
    where there are such keys. As many heads of queries as ``group`` says share one of keys.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    sees: Callable[[Any, Any], Any] = lambda i, j: (i == i) & (j == j)
    closed: Callable[[Any], Any] | None = None
    group: int = 1

    def spec(
        self, heads: int, size: int, bias: bool = False, scale: float | None = None
    ) -> AttentionSpec:
        """The variant of so many heads of keys."""
        scale = size**-0.5 if scale is None else scale
        kind = "tensor" if bias else "none"
        of_queries = self.group * heads
        return AttentionSpec(of_queries, heads, size, scale, bias=kind, **self.fields)


VARIANTS = {
    "all": Variant(),
    "causal": Variant(
        {"keys": "causal"},
        sees=lambda i, j: j <= i,
        closed=lambda distance: op.greater(distance, relax.const(0, "int64")),
    ),
    "window": Variant(
        {"keys": "window", "window": 5},
        sees=lambda i, j: abs(i - j) <= 5,
        closed=lambda distance: op.logical_or(
            op.less(distance, relax.const(-5, "int64")),
            op.greater(distance, relax.const(5, "int64")),
        ),
    ),
    # tables end within a block of tokens, and within a sequence
    "by_distance": Variant({"relative": "both", "last": 9}),
    "grouped": Variant(
        {"keys": "causal_window", "window": 20},
        sees=lambda i, j: (j <= i) & (i - j <= 20),
        closed=lambda distance: op.logical_or(
            op.less(distance, relax.const(-20, "int64")),
            op.greater(distance, relax.const(0, "int64")),
        ),
        group=3,
    ),
}
# Those in which a query does not see some keys.
CLOSING = [name for name, variant in VARIANTS.items() if variant.closed]
