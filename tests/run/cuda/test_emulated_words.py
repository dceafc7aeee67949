"""Fragments, conversions and exchanges in the emulator, by the layouts of the PTX manual."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from bertile.codegen.cuda import compiler
from bertile.run.cuda import emulator
from bertile.schedules.cuda import source
from bertile.schedules.cuda.source import Kernel, Launch
from bertile.targets import rows as targets

WORDS = Path(emulator.__file__).with_name("emulation.h")
PRELUDE = Path(source.__file__).with_name("prelude.cuh")
G, T = np.divmod(np.arange(32), 4)  # "groupID" and "threadID_in_group" of the manual


def run_warp(body: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Run `body` in one warp: it reads its lane's row of x and writes its row of y."""
    text = f"""
extern "C" __global__ void __launch_bounds__(32) words(const unsigned* x, unsigned* y) {{
  const int lane = threadIdx.x;
  x += lane * {x.shape[1]};
  y += lane * {y.shape[1]};
  {body}
}}
"""
    launch = Launch("words", (1, 1, 1), 32, 4096, ("x", "y"))
    assert x.dtype.itemsize == y.dtype.itemsize == 4
    emulator.run_kernel(Kernel(text, ("x", "y"), (launch,)), [x, y], {})
    return y


def packed(array: np.ndarray) -> np.ndarray:
    """(32 lanes, registers): neighbours along the last axis in one register."""
    return np.ascontiguousarray(array).view(np.uint32).reshape(32, -1)


def accumulators(d: np.ndarray) -> np.ndarray:
    """c0, c1: row g, columns 2t, 2t+1; c2, c3: row g+8."""
    return np.stack([d[G + 8 * (i // 2), 2 * T + i % 2] for i in range(4)], axis=1)


MULTIPLY = """
  {type} d[4];
  unsigned a[4] = {{x[4], x[5], x[6], x[7]}}, b[2] = {{x[8], x[9]}};
  for (int i = 0; i < 4; ++i) d[i] = {read}(x[i]);
  {word}(d, a, b);
  for (int i = 0; i < 4; ++i) y[i] = {write}(d[i]);
"""


def multiply(word: str, a: np.ndarray, b: np.ndarray, d: np.ndarray) -> np.ndarray:
    """What the word makes of fragments of a (16, k) and b (k, 8), added to d (16, 8)."""
    each = 4 // a.dtype.itemsize  # numbers in a register
    half = a.shape[1] // 2
    columns = T[:, None] * each + np.arange(each)
    halves = ((0, 0), (8, 0), (0, half), (8, half))  # rows and columns of a0, a1, a2, a3
    registers_a = [packed(a[(G + down)[:, None], columns + right]) for down, right in halves]
    registers_b = [packed(b[columns + down, G[:, None]]) for down in (0, half)]
    registers = np.hstack([accumulators(d).view(np.uint32), *registers_a, *registers_b])
    whole = d.dtype == np.int32
    names = {"type": "int", "read": "int", "write": "unsigned"}
    if not whole:
        names = {"type": "float", "read": "__uint_as_float", "write": "__float_as_uint"}
    sums = np.zeros((32, 4), np.uint32)
    run_warp(MULTIPLY.format(word=word, **names), registers, sums)
    return sums.view(d.dtype)


def bf16(array: np.ndarray) -> np.ndarray:
    return (array.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize(
    ("word", "k", "store"),
    [
        ("mma_16816<f16>", 16, lambda x: x.astype(np.float16)),
        ("mma_16816<bf16>", 16, bf16),
        ("mma_1688_tf32", 8, lambda x: x.astype(np.float32)),
    ],
)
def test_fragments_of_numbers_are_where_ptx_has_them(word, k, store) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-9, 10, shape).astype(np.float32) for shape in ((16, k), (k, 8)))
    d = rng.integers(-9, 10, (16, 8)).astype(np.float32)
    sums = multiply(word, store(a), store(b), d)
    np.testing.assert_array_equal(sums, accumulators(d + a @ b))


def test_fragments_of_bytes_are_where_ptx_has_them() -> None:
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (16, 32)).astype(np.uint8)
    b = rng.integers(-128, 128, (32, 8)).astype(np.int8)
    d = rng.integers(-9, 10, (16, 8)).astype(np.int32)
    sums = multiply("mma_16832_u8s8", a, b, d)
    np.testing.assert_array_equal(sums, accumulators(d + a.astype(np.int32) @ b))


def sparse_product(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The registers of each lane, and the accumulators that must come of them."""
    b, kept = rng.integers(-9, 10, (32, 8)), np.zeros((16, 8), np.uint32)
    a, few = np.zeros((16, 32), int), np.zeros((16, 16), int)
    for row in range(16):
        for four in range(8):
            where = np.sort(rng.choice(4, 2, replace=False))
            few[row, 2 * four : 2 * four + 2] = rng.integers(1, 9, 2)
            a[row, 4 * four + where] = few[row, 2 * four : 2 * four + 2]
            kept[row, four] = where[0] | where[1] << 2
    words = (kept.reshape(16, 2, 4) << np.arange(0, 16, 4, dtype=np.uint32)).sum(
        2
    )  # row, half of k
    said = np.where(T % 2, words[G, 1] | words[G + 8, 1] << 16, words[G, 0] | words[G + 8, 0] << 16)
    said[T > 1] = 0xFFFFFFFF  # nobody reads these
    pairs = T[:, None] * 2 + np.arange(2)
    halves = ((0, 0), (8, 0), (0, 8), (8, 8))
    registers = [
        packed(few.astype(np.float16)[(G + down)[:, None], pairs + at]) for down, at in halves
    ]
    registers += [packed(b.astype(np.float16)[pairs + at, G[:, None]]) for at in (0, 8, 16, 24)]
    return np.hstack([*registers, said.astype(np.uint32)[:, None]]), accumulators(a @ b)


SPARSE = """
  float d[4] = {};
  unsigned a[4] = {x[0], x[1], x[2], x[3]}, b[4] = {x[4], x[5], x[6], x[7]};
  mma_sp_16832<f16>(d, a, b, x[8]);
  for (int i = 0; i < 4; ++i) y[i] = __float_as_uint(d[i]);
"""


def test_two_of_four_are_where_ptx_has_them() -> None:
    registers, expected = sparse_product(np.random.default_rng(0))
    sums = run_warp(SPARSE, registers, np.zeros((32, 4), np.uint32))
    np.testing.assert_array_equal(sums.view(np.float32), expected)
    registers[5, 8] = 0x44444441  # in one of the fours the second lies before the first
    with pytest.raises(emulator.EmulationError, match="lane 5 says that columns 1 and 0"):
        run_warp(SPARSE, registers, np.zeros((32, 4), np.uint32))


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_are_loaded_as_ptx_has_them(count: int, transposed: bool) -> None:
    rows = np.arange(32 * 8, dtype=np.uint16).reshape(32, 8)  # of the four matrices
    word = f"load_matrix_x{count}" + "_trans" * transposed
    body = f"""
  SHARED_MEMORY(memory);
  *(uint4*)(memory + lane * 80) = *(const uint4*)x;
  warp_sync();
  unsigned r[{count}];
  {word}(r, memory + lane % {8 * count} * 80);
  for (int i = 0; i < {count}; ++i) y[i] = r[i];
"""
    loaded = run_warp(body, packed(rows), np.zeros((32, count), np.uint32))
    for i in range(count):
        matrix = rows[8 * i : 8 * i + 8]
        matrix = matrix.T if transposed else matrix
        expected = np.stack([matrix[G, 2 * T], matrix[G, 2 * T + 1]], axis=1)
        np.testing.assert_array_equal(loaded[:, i], packed(expected)[:, 0])


def test_lanes_exchange_values() -> None:
    values = np.arange(32, dtype=np.uint32)[:, None] + 100
    body = "y[0] = shuffle_xor(x[0], 5); y[1] = shuffle(x[0], (lane * 7) % 32);"
    exchanged = run_warp(body, values, np.zeros((32, 2), np.uint32))
    lanes = np.arange(32)
    np.testing.assert_array_equal(exchanged, np.stack([lanes ^ 5, lanes * 7 % 32], axis=1) + 100)


def test_conversions_round_as_the_hardware_does() -> None:
    special = [0, -0.0, 1, 65504, 65519.99, 65520, 1e9, 6e-8, 2.9e-8, np.inf, -np.inf, np.nan]
    special += [1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-9, 2**-24, 2**-25, -1e-40]
    rng = np.random.default_rng(0)
    values = np.concatenate([special, np.exp(rng.uniform(-20, 12, 32 * 8 - len(special)))]).astype(
        np.float32
    )
    body = """
  for (int i = 0; i < 8; ++i) {
    const float value = __uint_as_float(x[i]);
    y[4 * i] = pack2<f16>(value, 1.0f);
    y[4 * i + 1] = pack2<bf16>(1.0f, value);
    y[4 * i + 2] = to_tf32(value);
    y[4 * i + 3] = to_u8(value);
  }
"""
    rows = values.view(np.uint32).reshape(32, 8)
    converted = run_warp(body, rows, np.zeros((32, 32), np.uint32)).reshape(-1, 4)
    with np.errstate(over="ignore", invalid="ignore"):
        half = values.astype(np.float16)
    number = ~np.isnan(values)
    np.testing.assert_array_equal(
        converted[number, 0], half.view(np.uint16)[number].astype(np.uint32) | 0x3C000000
    )
    bits = values.view(np.uint32).astype(np.uint64)
    wide = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    np.testing.assert_array_equal(converted[number, 1], (wide << 16 | 0x3F80)[number])
    finite = np.isfinite(values)
    np.testing.assert_array_equal(converted[finite, 2], ((bits + 0x1000) & 0xFFFFE000)[finite])
    np.testing.assert_array_equal(converted[number, 3], np.clip(np.rint(values), 0, 255)[number])
    assert np.isnan((converted[~number, 0] & 0xFFFF).astype(np.uint16).view(np.float16)).all()


def test_both_files_say_the_same_words() -> None:
    def words(path: Path) -> set[str]:
        text = path.read_text(encoding="utf-8")
        names = re.findall(r"^(?:template <[^>]*>\s*)*(?:WORD|inline) [\w ]+?(\w+)\(", text, re.M)
        return {name for name in names if not re.match(r"_|emulated|make_|min$|max$|rsqrtf$", name)}

    prelude = words(PRELUDE)
    assert prelude == words(WORDS)
    assert {"mma_16816", "load_matrix_x4_trans", "copy_async_16", "wgmma"} <= prelude


@pytest.mark.parametrize(
    ("name", "cell"), [("cuda-sm75", "f16"), ("cuda-sm80", "f16"), ("cuda-sm90", "bf16")]
)
def test_words_compile(name: str, cell: str, tmp_path: Path) -> None:
    source = """
extern "C" __global__ void __launch_bounds__(128) words(const T* x, const u8* q, float* y) {
  SHARED_MEMORY(memory);
  copy_async_16(memory + threadIdx.x * 16, x + threadIdx.x * 8, true);
  copy_commit();
  copy_wait<0>();
  block_sync();
  unsigned a[4], b[2];
  load_matrix_x4(a, memory + threadIdx.x % 32 * 16);
  load_matrix_x2_trans(b, memory + threadIdx.x % 16 * 16);
  float d[4] = {};
  int e[4] = {};
  mma_16816<T>(d, a, b);
  mma_16832_u8s8(e, a, b);
  MORE
  for (int i = 0; i < 4; ++i)
    y[i * 128 + threadIdx.x] = shuffle_xor(d[i], 1) + to_float(from_float<T>(e[i])) + to_u8(d[i]);
}
"""
    more = "" if name == "cuda-sm75" else "mma_1688_tf32(d, a, b); mma_sp_16832<T>(d, a, a, b[0]);"
    source = source.replace("MORE", more).replace("T*", f"{cell}*").replace("<T>", f"<{cell}>")
    compiler.compile(source, targets.resolve(name), tmp_path)
