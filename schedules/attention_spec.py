"""Says what one attention computes: which keys a query sees, and what is done to a score.

    score(i, j) = cap(product(i, j) scale) + mask_j + bias(i, j)      for keys j in key_range(i)
    product     = q_i · k_j [+ q_i · keys(i - j)] [+ queries(i - j) · k_j]
    y_i         = Σ_j softmax_j(score(i, j)) v_j

Everything from the matcher to the kernels hands this on as it is. A variant of attention touches
five places: its field and the reference here, the matcher (``passes.fuse_attention``), the hook of
the kernel for CPUs, that of the kernel for GPUs (or its refusal), and one row of ``VARIANTS`` in
the tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bertile.schedules.reference import softmax

# How many keys before and behind its own place a query sees, None: all of them.
Reach = tuple[int | None, int | None]
REACH: dict[str, Callable[[int], Reach]] = {
    "all": lambda window: (None, None),
    "causal": lambda window: (None, 0),
    "window": lambda window: (window, window),
    "causal_window": lambda window: (window, 0),
}
WINDOWS = ("window", "causal_window")
BIASES = ("none", "tensor", "by_distance")
# Which vectors by distance there are.
RELATIVE: dict[str, tuple[str, ...]] = {
    "none": (),
    "keys": ("keys",),
    "queries": ("queries",),
    "both": ("keys", "queries"),
}


@dataclass(frozen=True)
class AttentionSpec:
    """``heads`` of queries, which ``kv_heads`` of keys and values serve, all of ``head_size``.

    ``keys`` are those that query i of a sequence sees: "all", those up to itself ("causal": j ≤ i),
    itself and ``window`` on each side ("window": |i - j| ≤ window), or before it alone
    ("causal_window": 0 ≤ i - j ≤ window). ``bias`` is what is added to a score beside the mask of
    its key: a "tensor" (B|1, H|1, S, S), or one entry "by_distance" j - i. ``softcap``, where it is
    not 0, bounds a score: softcap tanh(score / softcap).
    ``relative`` says for what there are vectors by distance too: "keys" that a query meets,
    "queries" that a key meets, or "both"; tables of those for i - j from -``last`` to ``last``,
    beyond which the outermost hold.
    """

    heads: int
    kv_heads: int
    head_size: int
    scale: float
    keys: str = "all"
    window: int = 0
    bias: str = "none"
    softcap: float = 0.0
    relative: str = "none"
    last: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError that names the field which is wrong."""
        for name in ("heads", "kv_heads", "head_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: at least 1 is needed")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads is {self.kv_heads}, which does not divide {self.heads}")
        if not math.isfinite(self.scale):
            raise ValueError(f"scale is {self.scale}: a finite number is needed")
        for name, known in (("keys", REACH), ("bias", BIASES), ("relative", RELATIVE)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; known: {', '.join(known)}")
        if (self.window > 0) != (self.keys in WINDOWS):
            raise ValueError(
                f"window is {self.window} where keys is {self.keys!r}: a window has at least 1 key"
                " on each side, and nothing else has a window"
            )
        if (self.last > 0) != (self.relative != "none"):
            raise ValueError(
                f"last is {self.last} where relative is {self.relative!r}: tables by distance reach"
                " to 1 at least, and nothing else has a last distance"
            )
        if not 0 <= self.softcap < math.inf:
            raise ValueError(f"softcap is {self.softcap}: 0 or a positive number is needed")
        # Exporters round 1/√D differently; kernels that are the same must have the same key.
        usual = self.head_size**-0.5
        if math.isclose(self.scale, usual, rel_tol=1e-6):
            object.__setattr__(self, "scale", usual)

    @classmethod
    def from_shape(cls, shape: Mapping[str, Any]) -> AttentionSpec:
        """What a task's shape says; what only its kernel knows (precision, writes) is left out."""
        bias = shape["bias"]
        return cls(
            heads=int(shape["heads"]),
            kv_heads=int(shape.get("kv_heads", shape["heads"])),
            head_size=int(shape["head_size"]),
            scale=float(shape["scale"]),
            keys=str(shape.get("keys", "all")),
            window=int(shape.get("window", 0)),
            bias=bias if isinstance(bias, str) else "tensor" if bias else "none",
            softcap=float(shape.get("softcap", 0.0)),
            relative=str(shape.get("relative", "none")),
            last=int(shape.get("last", 0)),
        )

    def shape(self) -> dict[str, Any]:
        """The shape of its task. What was there first (heads, head_size, scale, and bias as a flag)
        is always said and all else only where it is not the default, so that the keys of tuning
        logs stay those that they were.
        """
        shape: dict[str, Any] = {
            "heads": self.heads,
            "head_size": self.head_size,
            "scale": self.scale,
            "bias": {"none": False, "tensor": True}.get(self.bias, self.bias),
        }
        if self.kv_heads != self.heads:
            shape["kv_heads"] = self.kv_heads
        if self.keys != "all":
            shape["keys"] = self.keys
        if self.window:
            shape["window"] = self.window
        if self.softcap:
            shape["softcap"] = self.softcap
        if self.relative != "none":
            shape["relative"] = self.relative
            shape["last"] = self.last
        return shape

    def operands(self) -> tuple[str, ...]:
        """What attention reads: qkv (B, S, (H + 2 KV) D), mask (B|1, 1, 1, S), its bias, and its
        tables by distance (1, H, D, rows) with the row of each distance (2 last + 1).
        """
        bias = () if self.bias == "none" else ("bias",)
        return ("qkv", "mask", *bias, *self.tables(), *(("rows",) if self.tables() else ()))

    def tables(self) -> tuple[str, ...]:
        """Its tables by distance, of keys before those of queries."""
        return RELATIVE[self.relative]

    def channels(self) -> tuple[int, int, int]:
        """The channels of Q, of K and of V, as they lie side by side in qkv."""
        return tuple(heads * self.head_size for heads in (self.heads, *[self.kv_heads] * 2))

    @property
    def group(self) -> int:
        """How many heads of queries read the same keys and values."""
        return self.heads // self.kv_heads

    def reach(self) -> Reach:
        """How many keys before and behind its own place a query sees, None: all of them."""
        return REACH[self.keys](self.window)

    def key_range(self, query: int, length: int) -> range:
        """The keys that a query of a sequence of that length sees; itself is one of them."""
        before, behind = self.reach()
        low = 0 if before is None else max(0, query - before)
        return range(low, length if behind is None else min(length, query + behind + 1))

    def flops(self, tokens: int) -> float:
        """The two products of one sequence of that many tokens, of keys that are seen alone, and
        those by vectors of distances; the softmax is not counted.
        """
        if self.keys == "all":
            pairs = tokens * tokens
        else:
            pairs = sum(len(self.key_range(query, tokens)) for query in range(tokens))
        return (4.0 + 2.0 * len(self.tables())) * pairs * self.heads * self.head_size

    def reference(
        self,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        mask: np.ndarray | None = None,
        bias: np.ndarray | None = None,
        **tables: np.ndarray,
    ) -> np.ndarray:
        """(…, H, S, D) in float64 from q (…, H, S, D), k and v (…, KV, S, D).

        ``mask`` (…, 1, 1, S) is added to the scores of a key; ``bias`` is a tensor (…, H|1, S, S),
        or by distance (…, H|1, S|1, 2 S - 1), of which entry S - 1 is that of a query's own key.
        ``tables`` are those of its ``relative``, each (…, H, D, 2 last + 1).
        """
        if set(tables) != set(self.tables()):
            raise ValueError(f"tables are {self.relative!r}, and {sorted(tables)} came")
        if (bias is None) != (self.bias == "none"):
            raise ValueError(f"bias is {self.bias!r}, and {'no' if bias is None else 'one'} came")
        q, k, v = (x.astype("float64") for x in (q, k, v))
        k, v = (x.repeat(self.group, axis=-3) for x in (k, v))
        scores = q @ k.swapaxes(-1, -2)
        if "keys" in tables:
            scores = scores + self._picked(q, tables["keys"])
        if "queries" in tables:
            scores = scores + self._picked(k, tables["queries"][..., ::-1]).swapaxes(-1, -2)
        scores = scores * self.scale
        if self.softcap:
            scores = self.softcap * np.tanh(scores / self.softcap)
        if mask is not None:
            scores = scores + mask
        length = q.shape[-2]
        if bias is not None and self.bias == "by_distance":
            bias = _by_query(bias, length)
        if bias is not None:
            scores = scores + bias
        return softmax(np.where(self._seen(length), scores, -np.inf)) @ v

    def _picked(self, x: np.ndarray, table: np.ndarray) -> np.ndarray:
        """Of x (…, H, S, D) the products (…, H, S, S) with the vectors of (own - other place)."""
        places = np.arange(x.shape[-2])
        distance = np.clip(places[:, None] - places, -self.last, self.last)
        products = x @ table.astype("float64")
        distance = np.broadcast_to(distance, (*products.shape[:-1], len(places)))
        return np.take_along_axis(products, distance + self.last, -1)

    def _seen(self, length: int) -> np.ndarray:
        """Which keys each query sees, (S, S)."""
        seen = np.zeros((length, length), bool)
        for query in range(length):
            seen[query, self.key_range(query, length)] = True
        return seen

    def lacking(
        self,
        keys: Sequence[str],
        biases: Sequence[str],
        relative: Sequence[str] = ("none",),
        grouped_and_capped: bool = False,
    ) -> str | None:
        """What a kernel lacks that knows these ``keys``, ``biases`` and vectors by distance, groups
        of heads and bounds of scores where that is said, and nothing else special; None if nothing.
        """
        if self.kv_heads != self.heads and not grouped_and_capped:
            return f"fewer heads of keys than of queries (kv_heads {self.kv_heads})"
        if self.keys not in keys:
            return f"{self.keys} attention (keys {self.keys!r})"
        if self.bias not in biases:
            return f"a bias {self.bias.replace('_', ' ')} (bias {self.bias!r})"
        if self.relative not in relative:
            return f"keys and queries by distance (relative {self.relative!r})"
        if self.relative != "none" and self.group > 1:
            return "keys and queries by distance of heads that are grouped"
        if self.softcap and not grouped_and_capped:
            return f"a bound on scores (softcap {self.softcap:g})"
        return None


def keys_of_reach(reach: Reach) -> dict[str, Any] | None:
    """The fields (keys, window) of a spec whose queries see that far; None where none has it."""
    for keys, known in REACH.items():
        window = (reach[0] or 0) if keys in WINDOWS else 0
        if known(window) == reach and (window > 0) == (keys in WINDOWS):
            return {"keys": keys, "window": window}
    return None


def _by_query(bias: np.ndarray, length: int) -> np.ndarray:
    """(…, S|1, 2 S - 1) by distance → (…, S, S) by query and key."""
    places = np.arange(length)
    distance = np.broadcast_to(places - places[:, None], (*bias.shape[:-2], length, length))
    whole = np.broadcast_to(bias, (*bias.shape[:-2], length, bias.shape[-1]))
    return np.take_along_axis(whole, distance + length - 1, -1)
