"""Fused attention with an online softmax (FlashAttention-2, Dao 2023), sequences of any lengths.

    qkv (rows, pitch(3 H D)), keys (rows) additive, table (blocks, 4),
    [bias (B or 1, H or 1, S, S)], [limits (2)]  →  y (rows, pitch(H D))

    thread blocks over heads × groups of blocks of 16 queries, one block a warp
      for each tile of keys of the group's sequences, the next tiles on their way to shared memory
        scores: 16 × 8 accumulators of tensor cores
        online softmax (Milakov & Gimelshein 2018) in powers of two, scale and mask in one step
        context: the weights' accumulators are the left operand as they lie

Nothing but y is written. The table says where each block's sequence lies (see
``bertile.loader.token_blocks``): a group may span several sequences, then each warp takes its own
keys of what passes. That costs time only where sequences are shorter than the group is wide, and
packed sequences need no padding and no other kernel.

float16 and bfloat16 (and layers in bytes) multiply in 16 bits, tf32 in tf32, float32 without tensor
cores. ``writes`` "to_int8" gives y as bytes by ``limits``: low, and steps per unit.
"""

from __future__ import annotations

import math

from bertile.schedules.cuda.attention_samples import flops, sample
from bertile.schedules.cuda.forms import code, constants, element, pitch
from bertile.schedules.cuda.program import program
from bertile.schedules.cuda.source import Kernel
from bertile.schedules.schedule import Gpu, Knobs, Row, Schedule, Space
from bertile.schedules.task import Task

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
    """Warps (blocks of queries) of a thread block, keys of a tile, and tiles in shared memory."""
    gpu = _gpu(row)
    wide = _padded(task) > 64 or element(task) == "float"
    stages = (2, 3) if gpu.async_copy else (2,)

    def fits(warps: int, keys: int) -> bool:
        return _shared(task, warps, keys, max(stages)) <= gpu.shared_per_block

    warps = tuple(w for w in (1, 2, 4, 8) if w <= (4 if wide else 8) and fits(w, 16))
    keys = tuple(k for k in (16, 32, 64, 128) if k <= (64 if wide else 128) and fits(warps[-1], k))
    return {"warps": warps, "keys": keys, "stages": stages}


def default(task: Task, row: Row) -> Knobs:
    """Four warps; 64 keys a tile, as far as two thread blocks have room on a multiprocessor."""
    choices = space(task, row)
    warps = min(4, max(choices["warps"]))
    room = [
        k
        for k in choices["keys"]
        if k <= (32 if element(task) == "float" else 64)
        and 2 * _shared(task, warps, k, 2) <= _gpu(row).shared_per_sm
    ]
    return {"warps": warps, "keys": max(room, default=16), "stages": 2}


def _gpu(row: Row) -> Gpu:
    if row.gpu is None:
        raise ValueError("a schedule for GPUs was asked for another machine")
    return row.gpu


def _padded(task: Task) -> int:
    return pitch(int(task.shape["head_size"]))


def _width(task: Task) -> int:
    """Bytes of an element of qkv."""
    return 4 if element(task) == "float" else 2


def _stride(task: Task) -> int:
    """Elements between rows in shared memory: an odd number of 16 bytes, so that eight rows lie in
    different banks.
    """
    return _padded(task) + 16 // _width(task)


def _shared(task: Task, warps: int, keys: int, stages: int) -> int:
    rows = 16 * warps + 2 * stages * keys
    return rows * _stride(task) * _width(task) + 4 * stages * keys


def kernel(task: Task, knobs: Knobs, row: Row) -> Kernel:
    """(qkv, keys, table, [bias], [limits], y)."""
    heads, size, kind = int(task.shape["heads"]), int(task.shape["head_size"]), element(task)
    warps, bias = knobs["warps"], bool(task.shape["bias"])
    to_bytes = task.shape.get("writes") == "to_int8"
    values = constants(
        H=heads,
        D=size,
        DP=_padded(task),
        STRIDE=_stride(task),
        PITCH=pitch(3 * heads * size),
        PITCH_Y=pitch(heads * size),
        WARPS=warps,
        KEYS=knobs["keys"],
        STAGES=knobs["stages"],
        BIAS=bias,
        ALIGNED=size * _width(task) % 16 == 0,
        FACTOR=float(task.shape["scale"]) * math.log2(math.e),
    )
    y = "u8" if to_bytes else kind
    piece = math.gcd(size * (1 if to_bytes else _width(task)), 8 if to_bytes else 16)
    pointers = [(f"const {kind}", "qkv"), ("const float", "keys"), ("const int", "table")]
    pointers += [("const float", "bias")] if bias else []
    pointers += [("const float", "limits")] if to_bytes else []
    pointers.append((y, "y"))
    extents = ["blocks", *(["length", "bias_0", "bias_1"] if bias else [])]
    parts = [f"using X = {kind};\nusing Y = {y};", values, TYPES]
    parts += [f"using Piece = {PIECES[piece]};", code(_arithmetic(task, row))]
    rest = "length, bias_0, bias_1" if bias else "0, 0, 0"
    operands = "bias" if bias else "nullptr", "limits" if to_bytes else "nullptr"
    body = f"""
  attend(qkv, keys, table, {operands[0]}, {operands[1]}, y, blocks, {rest});"""
    return program(
        task.name,
        32 * warps,
        (f"(blocks + {warps - 1}) // {warps}", heads, 1),
        pointers,
        extents,
        "\n".join([*parts, code("attention.cuh")]),
        body,
        _shared(task, warps, knobs["keys"], knobs["stages"]),
    )


def _arithmetic(task: Task, row: Row) -> str:
    if element(task) != "float":
        return "attention_halves.cuh"
    tensor = task.shape["precision"] == "tf32" and _gpu(row).capability >= 80
    return "attention_tf32.cuh" if tensor else "attention_floats.cuh"


attention = Schedule("attention", space, default, kernel, sample, flops)
