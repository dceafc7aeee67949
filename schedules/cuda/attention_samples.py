"""Draws trial operands of attention in each precision, and computes its result by numpy."""

from __future__ import annotations

import numpy as np

from bertile.schedules import BLOCK_TOKENS
from bertile.schedules.attention_spec import AttentionSpec
from bertile.schedules.cuda.forms import (
    LOWEST,
    ROUNDING,
    element,
    empty_rows,
    from_device,
    from_rows,
    symbols,
    to_device,
    to_rows,
    token_table,
)
from bertile.schedules.reference import LEVELS, byte_limits
from bertile.schedules.schedule import Sample
from bertile.schedules.task import Task

USUAL = 8  # blocks of a sequence
BYTES = (-2.0, 2.0)  # the range of a result in bytes


def sample(task: Task, blocks: int, rng: np.random.Generator) -> Sample:
    """Sequences of 128 tokens, as requests have them; of few blocks two unequal ones. The last few
    keys of each are masked.
    """
    if 3 <= blocks < USUAL:
        counts = [blocks - blocks // 3, blocks // 3]
    else:
        counts = [USUAL] * (blocks // USUAL) + ([blocks % USUAL] if blocks % USUAL else [])
    return sequences_sample(task, [count * BLOCK_TOKENS - 5 for count in counts], rng)


def sequences_sample(
    task: Task,
    lengths: list[int],
    rng: np.random.Generator,
    planes: tuple[bool, bool] = (False, True),
) -> Sample:
    """Sequences of these lengths behind each other, some of their keys masked. ``planes``: whether
    each sequence, and each head, has a bias of its own.
    """
    spec, kind = AttentionSpec.from_shape(task.shape), element(task)
    heads, size, ends = spec.heads, spec.head_size, np.cumsum(spec.channels())
    shape = (heads, size, 2 * spec.last + 1)
    tables = {
        name: from_device(to_device(rng.standard_normal(shape), kind)) for name in spec.tables()
    }
    table, length = token_table(lengths), max(lengths)
    rows = len(table) * BLOCK_TOKENS
    qkv = to_rows(rng.standard_normal((rows, ends[-1])), kind)
    values = from_rows(qkv, ends[-1]).astype("float64")
    keys = np.where(rng.random(rows) < 0.1, -10000.0, 0.0).astype("float32")
    batch, of = (extent if own else 1 for own, extent in zip(planes, (len(lengths), heads)))
    bias = rng.standard_normal((batch, of, length, length)).astype("float32")
    expected = np.zeros((rows, heads * size))
    for row, own in enumerate(lengths):
        mine = np.flatnonzero(table[:, 0] == row)
        part = slice(mine[0] * BLOCK_TOKENS, (mine[-1] + 1) * BLOCK_TOKENS)
        keys[part][own:] = LOWEST
        keys[part][0] = 0.0
        added = None
        if spec.bias == "tensor":
            added = np.zeros((heads, len(keys[part]), len(keys[part])))
            added[:, :own, :own] += bias[min(row, batch - 1), :, :own, :own]
        q, k, v = (
            a.reshape(len(a), -1, size).transpose(1, 0, 2)
            for a in np.split(values[part], ends[:-1], 1)
        )
        context = spec.reference(q, k, v, keys[part], added, **tables)
        expected[part] = context.transpose(1, 0, 2).reshape(-1, heads * size)
        expected[part][own:] = 0.0  # of padding nothing is asked but a finite number
    inside = np.concatenate([np.arange(-(-n // BLOCK_TOKENS) * BLOCK_TOKENS) < n for n in lengths])
    extents = symbols(rows, len(lengths), length, bias_0=batch, bias_1=of)
    activations = [qkv, keys, table] + ([bias] if spec.bias == "tensor" else [])
    weights = list(tables.values())
    return _result(task, activations, weights, expected.astype("float32"), inside, extents)


def _result(
    task: Task,
    activations: list[np.ndarray],
    weights: list[np.ndarray],
    expected: np.ndarray,
    inside: np.ndarray,
    extents: dict[str, int],
) -> Sample:
    channels, kind = expected.shape[1], element(task)
    # the softmax's weights and the result are rounded; tf32 has the fraction of float16
    rounding = {"tf32": 4 * ROUNDING["f16"], "fp32": 2e-5}.get(
        str(task.shape["precision"]), 4 * ROUNDING[kind]
    )
    low, high = BYTES
    to_bytes = task.shape.get("writes") == "to_int8"
    if to_bytes:
        weights.append(byte_limits(low, high))
        expected, kind = np.clip(expected, low, high), "u8"
        rounding += 0.51 * (high - low) / LEVELS / max(1.0, float(np.abs(expected).max()))

    def decode(buffers: list[np.ndarray]) -> np.ndarray:
        values = from_rows(buffers[0], channels)
        if to_bytes:
            values = np.float32(low) + np.float32((high - low) / LEVELS) * values
        return np.where(inside[:, None] | ~np.isfinite(values), values, np.float32(0))

    results = [empty_rows(len(expected), channels, kind)]
    return Sample(activations, weights, expected, results, decode, rounding, extents)


def flops(task: Task, tokens: int) -> float:
    """Of one sequence of that many tokens."""
    return AttentionSpec.from_shape(task.shape).flops(tokens)
