"""Converts between row-major tensors and the GPU's activations: what ids, masks and results look
like outside, and what kernels read.

``table`` (blocks, 4) says of each block of 16 tokens: row of the batch, first token, the sequence's
first block, its number of blocks. None of these has knobs: together they are a few microseconds of
a request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bertile.schedules import BLOCK_TOKENS
from bertile.schedules.cuda.forms import (
    LOWEST,
    ROUNDING,
    code,
    constants,
    element,
    empty_rows,
    from_rows,
    pitch,
    symbols,
    to_rows,
    token_table,
)
from bertile.schedules.cuda.program import program
from bertile.schedules.cuda.source import Extent, Kernel
from bertile.schedules.schedule import Knobs, Row, Sample, Schedule
from bertile.schedules.task import Task

MOST_THREADS = 256


@dataclass(frozen=True)
class Words:
    """A layout's kernel: pointers (type, name), symbols, its grid (the threads of a block go over
    channels) and its body.
    """

    pointers: Sequence[tuple[str, str]]
    extents: Sequence[str]
    grid: tuple[Extent, Extent, Extent]
    body: str


# x (B or 1, S, C), table → y (rows, pitch(C)); rows behind the row-major tensor's end are zero
TOKENS_IN = Words(
    [("const float", "x"), ("const int", "table"), ("X", "y")],
    ["length", "x_0"],
    ("rows", 1, 1),
    """
  const long long row = blockIdx.x;
  const int* of = table + row / BLOCK_TOKENS * 4;
  const int batch = of[0] < x_0 ? of[0] : x_0 - 1, at = of[1] + row % BLOCK_TOKENS;
  const float* from = x + (static_cast<long long>(batch) * length + at) * C;
  row_in(at < length ? from : nullptr, y + row * PITCH);""",
)

# x (rows, pitch(C)), table → y (B, S, C); tokens that no block holds are zero: they are shared out
# among the blocks of their sequence
TOKENS_OUT = Words(
    [("const X", "x"), ("const int", "table"), ("float", "y")],
    ["length"],
    ("rows", 1, 1),
    """
  const long long row = blockIdx.x;
  const int* of = table + row / BLOCK_TOKENS * 4;
  const int at = of[1] + row % BLOCK_TOKENS;
  float* sequence = y + static_cast<long long>(of[0]) * length * C;
  if (at < length) row_out(x + row * PITCH, sequence + static_cast<long long>(at) * C);
  for (int t = at + of[3] * BLOCK_TOKENS; t < length; t += of[3] * BLOCK_TOKENS)
    row_out(nullptr, sequence + static_cast<long long>(t) * C);""",
)

# x (N, C) → y (N, pitch(C))
ROWS_IN = Words(
    [("const float", "x"), ("X", "y")],
    [],
    ("rows", 1, 1),
    """
  const long long row = blockIdx.x;
  row_in(x + row * C, y + row * PITCH);""",
)

# x (N, pitch(C)) → y (N, C)
ROWS_OUT = Words(
    [("const X", "x"), ("float", "y")],
    [],
    ("rows", 1, 1),
    """
  const long long row = blockIdx.x;
  row_out(x + row * PITCH, y + row * C);""",
)

# x (rows, pitch(C)), table → y (B, C): the first token ([CLS]) of each sequence
FIRST_TOKEN = Words(
    [("const X", "x"), ("const int", "table"), ("float", "y")],
    [],
    ("blocks", 1, 1),
    """
  const long long block = blockIdx.x;
  const int* of = table + block * 4;
  const X* first = x + block * BLOCK_TOKENS * PITCH;
  if (of[1] == 0) row_out(first, y + static_cast<long long>(of[0]) * C);""",
)

# mask (B or 1, 1, 1, S) additive, table → y (rows): keys past the end never win
KEY_MASK = Words(
    [("const float", "mask"), ("const int", "table"), ("float", "y")],
    ["rows", "length", "mask_0"],
    (f"(rows + {MOST_THREADS - 1}) // {MOST_THREADS}", 1, 1),
    f"""
  const int row = blockIdx.x * {MOST_THREADS} + threadIdx.x;
  if (row >= rows) return;
  const int* of = table + row / BLOCK_TOKENS * 4;
  const int batch = of[0] < mask_0 ? of[0] : mask_0 - 1, at = of[1] + row % BLOCK_TOKENS;
  const float value = at < length ? mask[static_cast<long long>(batch) * length + at] : {LOWEST}f;
  y[row] = fmaxf(value, {LOWEST}f);""",
)


def _kernel(words: Words) -> Callable[[Task, Knobs, Row], Kernel]:
    def kernel(task: Task, knobs: Knobs, row: Row) -> Kernel:
        channels, threads, helpers = task.shape.get("channels"), MOST_THREADS, ""
        if channels:
            vector = 4 if int(channels) % 4 == 0 else 1
            wide = pitch(int(channels))
            threads = min(MOST_THREADS, -(-wide // vector // 32) * 32)
            values = constants(C=int(channels), PITCH=wide, VECTOR=vector)
            helpers = f"using X = {element(task)};\n{values}\n{code('layout.cuh')}"
        kinds = {"const X": f"const {element(task)}", "X": element(task)} if channels else {}
        pointers = [(kinds.get(kind, kind), name) for kind, name in words.pointers]
        return program(task.name, threads, words.grid, pointers, words.extents, helpers, words.body)

    return kernel


def _sample(task: Task, blocks: int, rng: np.random.Generator) -> Sample:
    """Two sequences, the second one shorter (or of one token), neither a multiple of 16."""
    channels, operation = int(task.shape.get("channels", 1)), task.operation
    length = max(1, (blocks - 1) * BLOCK_TOKENS - 3)
    lengths = [length, 1]
    table = token_table(lengths)
    extents = {"mask_0": len(lengths), "x_0": len(lengths)}
    of = symbols(len(table) * BLOCK_TOKENS, len(lengths), length, **extents)
    if operation == "key_mask":
        mask = rng.standard_normal((2, 1, 1, length)).astype("float32")
        mask[0, 0, 0, 0] = np.finfo("float32").min  # as some exporters write it
        expected = np.full((len(table), BLOCK_TOKENS), LOWEST, "float32")
        for i, (row, start, _, _) in enumerate(table):
            stop = min(length, start + BLOCK_TOKENS)
            expected[i, : stop - start] = np.maximum(mask[row, 0, 0, start:stop], LOWEST)
        return Sample([mask, table], [], expected.reshape(-1), tolerance=0.0, symbols=of)
    kind = element(task)
    values = rng.standard_normal((2, length, channels)).astype("float32")
    rows = [np.zeros((-(-n // BLOCK_TOKENS) * BLOCK_TOKENS, channels), "float32") for n in lengths]
    for mine, inside in zip(rows, values):
        mine[: min(length, len(mine))] = inside[: len(mine)]
    packed = to_rows(np.concatenate(rows), kind)
    pooled = symbols(length, length)
    pooled["rows"] = length
    rounding = 2 * ROUNDING[kind]
    if operation in ("tokens_in", "rows_in"):
        activations = [values, table] if operation == "tokens_in" else [values[0]]
        expected = np.concatenate(rows) if operation == "tokens_in" else values[0]
        result = empty_rows(len(expected), channels, kind)

        def decode(buffers: list[np.ndarray]) -> np.ndarray:
            return from_rows(buffers[0], channels)

        of = of if operation == "tokens_in" else pooled
        return Sample(activations, [], expected, [result], decode, rounding, of)
    if operation == "rows_out":
        stored = to_rows(values[0], kind)
        return Sample([stored], [], values[0], tolerance=rounding, symbols=pooled)
    if operation == "first_token":
        return Sample([packed, table], [], values[:, 0], tolerance=rounding, symbols=of)
    expected = np.zeros_like(values)
    for row, mine in enumerate(rows):
        end = min(length, len(mine))
        expected[row, :end] = mine[:end]
    return Sample([packed, table], [], expected, tolerance=rounding, symbols=of)


def _layout(operation: str, words: Words) -> Schedule:
    return Schedule(
        operation, lambda t, r: {}, lambda t, r: {}, _kernel(words), _sample, lambda t, n: 0.0
    )


tokens_in = _layout("tokens_in", TOKENS_IN)
tokens_out = _layout("tokens_out", TOKENS_OUT)
rows_in = _layout("rows_in", ROWS_IN)
rows_out = _layout("rows_out", ROWS_OUT)
first_token = _layout("first_token", FIRST_TOKEN)
key_mask = _layout("key_mask", KEY_MASK)
