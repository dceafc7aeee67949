"""Fuses attention with an online softmax (FlashAttention-2, Dao 2023), for sequences of any
lengths.

    qkv (rows, pitch((H + 2 KV) D)), keys (rows) additive, table (blocks, 4),
    [bias (B or 1, H or 1, S, S)], [keys and queries by distance (H, distances, pitch(D))],
    [limits (2)]  →  y (rows, pitch(H D))

    thread blocks over heads × groups of blocks of 16 queries, one block a warp
      for each tile of keys that the group sees, the next tiles on their way to shared memory
        scores: 16 × 8 accumulators of tensor cores
        online softmax (Milakov & Gimelshein 2018) in powers of two, scale and mask in one step
        context: the weights' accumulators are the left operand as they lie

Nothing but y is written. The table says where each block's sequence lies (see
``bertile.loader.token_blocks``): a group may span several sequences, then each warp takes its own
keys of what passes. That costs time only where sequences are shorter than the group is wide, and
packed sequences need no padding and no other kernel. What an ``AttentionSpec`` may vary: tiles
outside of a window are not visited; heads that share keys and values are warps of one thread block,
as many as there are; vectors by distance come with the tiles (``attention_distances.cuh``).

There are two entries. Where blocks are ``few``, there are more multiprocessors than groups of them:
then several warps share the keys of a block, and add up what they have found at the end.

float16 and bfloat16 (and layers in bytes) multiply in 16 bits, tf32 in tf32, float32 without tensor
cores. ``writes`` "to_int8" gives y as bytes by ``limits``: low, and steps per unit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from bertile.schedules.attention_spec import REACH, RELATIVE, AttentionSpec
from bertile.schedules.cuda import precisions
from bertile.schedules.cuda.attention_samples import flops, sample
from bertile.schedules.cuda.forms import code, constants, element, pitch, to_device
from bertile.schedules.cuda.program import program, together
from bertile.schedules.cuda.source import Extent, Kernel
from bertile.schedules.schedule import Gpu, Knobs, Row, Schedule, Space
from bertile.schedules.task import Task

FEW = (0, 16, 32, 64)  # blocks from which they are many
ALL = -1  # of keys that a query sees on one side: no bound
LINE = 41  # floats from one row of a warp's 16 by 32 products with vectors by distance to the next
PIECES = {16: "Sixteen", 8: "Eight", 4: "unsigned", 2: "unsigned short", 1: "u8"}
TYPES = """
struct alignas(16) Sixteen {
  unsigned word[4];
};
struct alignas(8) Eight {
  unsigned word[2];
};
using Scores = float[KEYS / 8][4];
using Context = float[DP / 8][4];
"""


def space(task: Task, row: Row) -> Space:
    """Warps of a thread block, keys of a tile, and tiles in shared memory; for fewer blocks than
    ``few`` also by how many warps a tile is split.
    """
    gpu = _gpu(row)
    wide = _padded(task) > 64 or element(task) == "float"
    stages = (2, 3) if gpu.async_copy else (2,)

    def fits(warps: int, keys: int) -> bool:
        return _shared(task, warps, 1, keys, max(stages)) <= gpu.shared_per_block

    warps = tuple(w for w in (1, 2, 4, 8) if w <= (4 if wide else 8) and fits(w, 16))
    if not warps:  # a head is too wide
        return {"warps": ()}
    keys = tuple(k for k in (16, 32, 64, 128) if k <= (64 if wide else 128) and fits(warps[-1], k))
    split = tuple(s for s in (1, 2, 4) if s <= warps[-1] and 16 * s <= keys[-1])
    few_keys = tuple(k for k in keys if k >= 16 * split[-1])
    return {
        "warps": warps,
        "keys": keys,
        "stages": stages,
        "few": FEW,
        "few_warps": tuple(w for w in warps if w >= split[-1]),
        "few_keys": few_keys,
        "split": split,
    }


def default(task: Task, row: Row) -> Knobs:
    """Four warps; 64 keys a tile, as far as two thread blocks have room on a multiprocessor. Of few
    blocks two warps to each, and tiles as large as there are, as long as groups of four are fewer
    than multiprocessors.
    """
    choices, gpu = space(task, row), _gpu(row)
    warps = min(4, choices["warps"][-1])
    room = [
        k
        for k in choices["keys"]
        if k <= (32 if element(task) == "float" else 64)
        and 2 * _shared(task, warps, 1, k, 2) <= gpu.shared_per_sm
    ]
    heads = _spec(task).heads
    few = max(end for end in FEW if end * heads <= 4 * gpu.multiprocessors)
    return {
        "warps": warps,
        "keys": max(room, default=16),
        "stages": 2,
        "few": few,
        "few_warps": warps,
        "few_keys": choices["few_keys"][-1],
        "split": min(2, choices["split"][-1]),
    }


def refuses(task: Task) -> str | None:
    """What of a task has no kernel here, None if nothing."""
    return _spec(task).lacking(
        tuple(REACH), ("none", "tensor"), tuple(RELATIVE), grouped_and_capped=True
    )


def _spec(task: Task) -> AttentionSpec:
    return AttentionSpec.from_shape(task.shape)


def _gpu(row: Row) -> Gpu:
    if row.gpu is None:
        raise ValueError("a schedule for GPUs was asked for another machine")
    return row.gpu


def _padded(task: Task) -> int:
    return pitch(_spec(task).head_size)


def _width(task: Task) -> int:
    """Bytes of an element of qkv."""
    return 4 if element(task) == "float" else 2


def _stride(task: Task) -> int:
    """Elements between rows in shared memory: an odd number of 16 bytes, so that eight rows lie in
    different banks.
    """
    return _padded(task) + 16 // _width(task)


def _shared(task: Task, warps: int, split: int, keys: int, stages: int) -> int:
    row, units, spec = _stride(task) * _width(task), warps // split, _spec(task)
    tiles = stages * keys * (2 * row + 4)
    if spec.tables():
        around = keys + 16 * units // _together(spec, units)
        tiles += stages * len(spec.tables()) * around * row + warps * 16 * LINE * 4
    sums = (warps - units) * 32 * 4 * (4 + _padded(task) // 2)
    return 16 * units * row + max(tiles, sums)


def _together(spec: AttentionSpec, units: int) -> int:
    """How many of the heads that share keys and values a thread block has."""
    return math.gcd(spec.group, units)


def kernel(task: Task, knobs: Knobs, row: Row) -> Kernel:
    """(qkv, keys, table, [bias], [tables by distance], [limits], y)."""
    if lacks := refuses(task):
        raise ValueError(f"there is no kernel for {lacks}")
    few, name = knobs["few"], task.name
    cut = knobs["warps"], 1, knobs["keys"], knobs["stages"]
    many = _entry(task, row, name, cut, f"blocks >= {few}" if few else 1)
    if not few:
        return many
    cut = knobs["few_warps"], knobs["split"], knobs["few_keys"], 2
    return together(_entry(task, row, f"{name}_few", cut, f"blocks < {few}"), many)


def _entry(task: Task, row: Row, name: str, cut: tuple[int, int, int, int], when: Extent) -> Kernel:
    kind, (warps, split, keys, stages), spec = element(task), cut, _spec(task)
    bias, to_bytes = spec.bias == "tensor", task.shape.get("writes") == "to_int8"
    y = "u8" if to_bytes else kind
    pointers = [(f"const {kind}", "qkv"), ("const float", "keys"), ("const int", "table")]
    pointers += [("const float", "bias")] if bias else []
    pointers += [(f"const {kind}", f"by_{name}") for name in spec.tables()]
    pointers += [("const float", "limits")] if to_bytes else []
    pointers.append((y, "y"))
    piece = math.gcd(spec.head_size * (1 if to_bytes else _width(task)), 8 if to_bytes else 16)
    parts = [
        f"using X = {kind};\nusing Y = {y};",
        _constants(task, *cut),
        TYPES,
        f"using Piece = {PIECES[piece]};",
        code(_arithmetic(task, row)),
        code("attention_distances.cuh"),
        code("attention.cuh"),
    ]
    has = {operand for _, operand in pointers}
    optional = ("bias", "by_keys", "by_queries", "limits")
    operands = [operand if operand in has else "nullptr" for operand in optional]
    tables = f"{{{operands[1]}, {operands[2]}}}"
    rest = "length, bias_0, bias_1" if bias else "0, 0, 0"
    beside = _together(spec, warps // split)
    across = warps // split // beside  # blocks of queries of a thread block
    return program(
        name,
        32 * warps,
        (f"(blocks + {across - 1}) // {across}", spec.heads // beside, 1),
        pointers,
        ["blocks", *(["length", "bias_0", "bias_1"] if bias else [])],
        "\n".join(parts),
        f"\n  attend(qkv, keys, table, {operands[0]}, {tables}, {operands[3]}, y, blocks, {rest});",
        _shared(task, warps, split, keys, stages),
        when,
    )


def _constants(task: Task, warps: int, split: int, keys: int, stages: int) -> str:
    spec, units = _spec(task), warps // split
    queries, keys_of, values = spec.channels()
    before, behind = (ALL if most is None else most for most in spec.reach())
    factor = spec.scale * math.log2(math.e)
    if spec.softcap:  # tanh x is 1 - 2 / (1 + exp 2 x)
        factor *= 2.0 / spec.softcap
    return constants(
        H=spec.heads,
        KV=spec.kv_heads,
        GROUP=spec.group,
        TOGETHER=_together(spec, units),
        D=spec.head_size,
        DP=_padded(task),
        STRIDE=_stride(task),
        ROW=16 * _stride(task),
        PITCH=pitch(queries + keys_of + values),
        PITCH_Y=pitch(queries),
        WARPS=warps,
        SPLIT=split,
        UNITS=units,
        BLOCKS=units // _together(spec, units),
        TILE=keys,
        KEYS=keys // split,
        STAGES=stages,
        BIAS=spec.bias == "tensor",
        ALL=ALL,
        BEFORE=before,
        BEHIND=behind,
        ALIGNED=spec.head_size * _width(task) % 16 == 0,
        FACTOR=factor,
        CAP=spec.softcap * math.log2(math.e),
        BY_KEYS="keys" in spec.tables(),
        BY_QUERIES="queries" in spec.tables(),
        LAST=spec.last,
        LINE=LINE,
    )


def _arithmetic(task: Task, row: Row) -> str:
    if element(task) != "float":
        return "attention_halves.cuh"
    tensor = precisions.of(task).multiply and _gpu(row).capability >= 80
    return "attention_tf32.cuh" if tensor else "attention_floats.cuh"


def pack(task: Task, knobs: Knobs, weights: Sequence[np.ndarray], row: Row) -> list[np.ndarray]:
    """Tables ([1,] H, D, 2 last + 1) by distance → (H, 2 last + 1, pitch(D)) as qkv is stored; what
    else there is as it is.
    """
    spec, packed = _spec(task), list(weights)
    for i, _ in enumerate(spec.tables()):
        table = weights[i].reshape(spec.heads, spec.head_size, -1).transpose(0, 2, 1)
        padding = _padded(task) - spec.head_size
        packed[i] = to_device(np.pad(table, ((0, 0), (0, 0), (0, padding))), element(task))
    return packed


attention = Schedule("attention", space, default, kernel, sample, flops, pack, refuses=refuses)
