"""Adds to a score what the distance of its tokens says: products with vectors that stand in tables.

    score(i, j) += q_i · keys(i - j) + queries(i - j) · k_j

Queries lie in lanes, so for one key and one channel the 16 distances lie side by side in a table
(H, D, distances): a vector that is read where it lies, at any place. The tables go on at both ends
with what they end in, so that one bound on the first place serves all that is read from there.
Lanes hold two channels where those of q and k do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from bertile.schedules import BLOCK_TOKENS
from bertile.schedules.attention_spec import AttentionSpec
from bertile.schedules.cpu import arithmetic as arithmetics
from bertile.schedules.cpu import lanes, product
from bertile.schedules.cpu.arithmetic import Arithmetic
from bertile.schedules.schedule import Knobs, Row
from bertile.schedules.task import Task

KEYS, QUERIES = BLOCK_TOKENS, 2 * BLOCK_TOKENS  # the most that are read from one place
BEYOND = KEYS + QUERIES  # distances that a table goes on at each end


@dataclass(frozen=True)
class Distances:
    """The tables of a kernel; None is what the task has not."""

    spec: AttentionSpec
    keys: Any
    queries: Any

    @staticmethod
    def declare(builder: lanes.KernelBuilder, spec: AttentionSpec, group: int, lane: str) -> Any:
        """[keys], [queries]."""
        shape = (spec.heads, spec.head_size // group, _width(spec))
        tables = {
            name: builder.tensor(f"{name}_by_distance", *shape, dtype=lane)
            for name in spec.tables()
        }
        return Distances(spec, tables.get("keys"), tables.get("queries"))

    def near(self, own: Any, key: Any, head: Any, math: Arithmetic) -> _Near:
        """What is read for some keys from place ``key`` on and queries from block ``own`` on."""
        if self.spec.relative == "none":
            return _Near(self, None, head, math)
        centre = BEYOND + self.spec.last
        at = own * BLOCK_TOKENS - key + centre
        # all that is read lies then before the first distance, or behind the last
        low, high = BEYOND - (QUERIES - 1), centre + self.spec.last + (KEYS - 1)
        return _Near(self, T.Bind(tirx.max(tirx.min(at, high), low)), head, math)


@dataclass(frozen=True)
class _Near:
    tables: Distances
    at: Any
    head: Any
    math: Arithmetic

    def added(self, value: Any, q: Any, k: Any, d: Any, i: int, j: int) -> Any:
        """The scores of block ``i`` of queries with key ``j``, and those of lane d by distance."""
        tables = self.tables
        if tables.keys is not None:
            value = self.math.multiply_add(value, q, self._vector(tables.keys, d, i, j))
        if tables.queries is not None:
            value = self.math.multiply_add(value, self._vector(tables.queries, d, i, j), k)
        return value

    def _vector(self, table: Any, d: Any, i: int, j: int) -> Any:
        place = self.at + (i * BLOCK_TOKENS - j)
        return table[self.head, d, tirx.Ramp(place, 1, BLOCK_TOKENS)]


def _width(spec: AttentionSpec) -> int:
    """Places of a table: whole vectors."""
    return -(-(2 * (spec.last + BEYOND) + 1) // BLOCK_TOKENS) * BLOCK_TOKENS


def pack(task: Task, knobs: Knobs, weights: Sequence[np.ndarray], row: Row) -> list[np.ndarray]:
    """Tables ([1,] H, D, 2 last + 1) as the kernel reads them; what else there is as it is."""
    spec = AttentionSpec.from_shape(task.shape)
    count, group = len(spec.tables()), product.group(task)
    return [*(_packed(table, spec, group) for table in weights[:count]), *weights[count:]]


def _packed(table: np.ndarray, spec: AttentionSpec, group: int) -> np.ndarray:
    table = table.reshape(spec.heads, spec.head_size, -1)
    behind = _width(spec) - table.shape[-1] - BEYOND
    table = np.pad(table, ((0, 0), (0, 0), (BEYOND, behind)), mode="edge")
    if group == 1:
        return np.ascontiguousarray(table)
    pairs = arithmetics.bf16_pairs(table.transpose(0, 2, 1))
    return np.ascontiguousarray(pairs.transpose(0, 2, 1))


def sample(spec: AttentionSpec, rng: np.random.Generator, halves: bool) -> dict[str, np.ndarray]:
    """Random tables of each kind that a spec has; of numbers of bfloat16 for ``halves``."""
    tables = {}
    for name in spec.tables():
        shape = (spec.heads, 2 * spec.last + 1, spec.head_size)
        table = rng.standard_normal(shape).astype("float32")
        if halves:
            table = arithmetics.bf16_values(arithmetics.bf16_pairs(table))
        tables[name] = np.ascontiguousarray(table.transpose(0, 2, 1))
    return tables
