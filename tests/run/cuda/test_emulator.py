"""The emulator against numpy, and the mistakes that it must find."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import pytest

from bertile.base.errors import PlatformError
from bertile.run.cuda import emulator
from bertile.schedules.cuda.source import Kernel, Launch

# y (rows, n) = x (rows, k) · w (n, k), 64 × 64 per block, k in steps of 32, three stages.
PRODUCT = """
constexpr int PITCH = 40, STAGES = 3;
extern "C" __global__ void __launch_bounds__(128)
product(const f16* x, const f16* w, float* y, int rows, int n, int k) {
  SHARED_MEMORY(memory);
  f16* xs = (f16*)memory;
  f16* ws = xs + STAGES * 64 * PITCH;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row0 = blockIdx.x * 64, column0 = blockIdx.y * 64;
  float d[8][4] = {};
  auto load = [&](int step) {
    for (int i = threadIdx.x; step * 32 < k && i < 256; i += 128) {
      const int r = i / 4, c = i % 4 * 8, to = (step % STAGES * 64 + r) * PITCH + c;
      copy_async_16(xs + to, x + (row0 + r) * k + step * 32 + c, row0 + r < rows);
      copy_async_16(ws + to, w + (column0 + r) * k + step * 32 + c, column0 + r < n);
    }
    copy_commit();
  };
  load(0);
  load(1);
  for (int step = 0; step * 32 < k; ++step) {
    copy_wait<1>();
    block_sync();
    load(step + 2);
    const int first = step % STAGES * 64;
    for (int at = 0; at < 32; at += 16) {
      unsigned a[4], b[2];
      load_matrix_x4(a, xs + (first + warp * 16 + lane % 16) * PITCH + at + lane / 16 * 8);
      for (int j = 0; j < 8; ++j) {
        load_matrix_x2(b, ws + (first + j * 8 + lane % 8) * PITCH + at + lane / 8 % 2 * 8);
        mma_16816<f16>(d[j], a, b);
      }
    }
  }
  for (int j = 0; j < 8; ++j)
    for (int i = 0; i < 4; ++i) {
      const int r = row0 + warp * 16 + lane / 4 + i / 2 * 8;
      const int c = column0 + j * 8 + lane % 4 * 2 + i % 2;
      if (r < rows && c < n) y[r * n + c] = d[j][i];
    }
}
"""


def product(source: str = PRODUCT, **changes: int) -> Kernel:
    shared = changes.get("shared", 2 * 3 * 64 * 40 * 2)
    arguments = ("x", "w", "y", "rows", "n", "k")
    grid = ("(rows + 63) // 64", "(n + 63) // 64", 1)
    launch = Launch("product", grid, changes.get("threads", 128), shared, arguments)
    return Kernel(source, ("x", "w", "y"), (launch,))


def run_product(kernel: Kernel, rows: int = 100, n: int = 72, k: int = 160, seed: int = 0):
    rng = np.random.default_rng(seed)
    x, w = (rng.standard_normal((count, k)).astype(np.float16) for count in (rows, n))
    y = np.full((rows, n), np.nan, np.float32)
    emulator.run_kernel(kernel, [x, w, y], {"rows": rows, "n": n, "k": k}, seed=seed)
    return y, x.astype(np.float32) @ w.astype(np.float32).T


def test_product_of_matrices_equals_numpy() -> None:
    actual, expected = run_product(product())
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("right", "wrong", "mistake"),
    [
        ("copy_wait<1>();", "", "before copy_wait"),
        ("block_sync();", "", "race|before copy_wait|nothing was written to"),
        ("xs + to,", "xs + to + 1,", "shared address is not a multiple of 16"),
        ("+ at + lane / 16 * 8", "+ at + lane / 16 * 7", "load_matrix: lane 16 gives an address"),
        ("row0 + r < rows)", "true)", "at byte 3.... of an array of 32000 bytes"),
        ("y[r * n + c] =", "y[r * n + c + 1] =", "at byte 28800 of an array of 28800 bytes"),
        ("block_sync();", "if (threadIdx.x) block_sync();", "reached by 1 of the 32 lanes"),
        ("mma_16816<f16>", "if (lane) mma_16816<f16>", "in mma_16816<f16> and in load_matrix at"),
    ],
)
def test_mistake_is_found(right: str, wrong: str, mistake: str) -> None:
    assert right in PRODUCT
    with pytest.raises(emulator.EmulationError, match=mistake):
        run_product(product(PRODUCT.replace(right, wrong)))


def test_shared_memory_that_is_too_small_is_found() -> None:
    with pytest.raises(emulator.EmulationError, match="of shared memory of 20480 bytes"):
        run_product(product(shared=20480))


def test_more_threads_than_the_launch_bounds_are_refused() -> None:
    with pytest.raises(emulator.EmulationError, match="made for at most 128"):
        run_product(product(threads=160))


def small(body: str, threads: int = 64, shared: int = 1024) -> Kernel:
    """`body` in one block; it may read x (256 floats, each its own index) and write y."""
    text = f"""
extern "C" __global__ void small(const float* x, float* y) {{
  SHARED_MEMORY(memory);
  float* cells = (float*)memory;
  const int i = threadIdx.x;
  {body}
}}
"""
    return Kernel(text, ("x", "y"), (Launch("small", (1, 1, 1), threads, shared, ("x", "y")),))


def arrays() -> list[np.ndarray]:
    return [np.arange(256, dtype=np.float32), np.zeros(256, np.float32)]


def run_small(body: str, threads: int = 64, seed: int = 0) -> np.ndarray:
    x, y = arrays()
    emulator.run_kernel(small(body, threads), [x, y], {}, seed=seed)
    return y


def test_mistakes_of_shared_memory_are_found() -> None:
    good = "cells[i] = x[i]; block_sync(); y[i] = cells[63 - i];"
    np.testing.assert_array_equal(run_small(good)[:64], np.arange(64)[::-1])
    wrong = {
        good.replace("block_sync();", ""): "race: reads|which nothing was written to",
        good.replace("block_sync();", "warp_sync();"): "race: reads|which nothing was written to",
        good + "cells[i] = 0;": "race: ",
        "cells[i % 32] = x[i];": "race: writes",
        "y[i] = cells[i];": "which nothing was written to",
        "cells[i + 193] = 0;": "writes 4 bytes at byte 1024 of shared memory of 1024 bytes",
        "cells[i] = 0; block_sync(); *(uint4*)(memory + 4 * (i % 8)) = {};": "not aligned",
        "__shared__ float own[64]; own[i] = 1; y[i] = own[i ^ 33];": "static shared|nothing was",
        "if (i == 9) return; block_sync();": "barrier 0 is reached by 63 of 64 threads",
        "if (i == 9) return; y[i] = shuffle_xor(x[i], 1);": "31 of the 32 lanes of warp 0",
        "group_sync(i / 32 + 1, 64);": "is reached by",
        "y[i] = x[i + 256 - 63];": "reads 4 bytes at byte 1024 of an array of 1024 bytes",
        "y[i - 1] = 0;": "writes 4 bytes at byte -4 of an array of 1024 bytes",
        "((double*)y)[0] = *(const double*)(x + 1);": "not aligned",
    }
    for body, mistake in wrong.items():
        with pytest.raises(emulator.EmulationError, match=mistake):
            run_small(body)


@pytest.mark.parametrize(
    "wrong", ["y[i] = 1;", "y[64 * blockIdx.x + i] = y[(64 * blockIdx.x + i + 64) % 128];"]
)
def test_blocks_that_depend_on_each_other_are_found(wrong: str) -> None:
    kernel = small("y[64 * blockIdx.x + i] = x[i];")
    launches = (dataclasses.replace(kernel.launches[0], grid=(2, 1, 1)),)
    emulator.run_kernel(dataclasses.replace(kernel, launches=launches), arrays(), {})
    kernel = dataclasses.replace(small(wrong), launches=launches)
    with pytest.raises(emulator.EmulationError, match=r"which block \(\d, 0, 0\) has written"):
        emulator.run_kernel(kernel, arrays(), {})


def test_what_is_no_mistake_runs() -> None:
    bodies = {
        # warps of their own: a barrier of a warp is enough
        "cells[i] = x[i]; warp_sync(); y[i] = cells[i ^ 31];": np.arange(64) ^ 31,
        # two groups of a warp each, with barriers of their own
        "cells[i] = x[i]; group_sync(1 + i / 32, 32); y[i] = cells[i ^ 7];": np.arange(64) ^ 7,
        "__shared__ float own[64]; own[i] = x[i]; block_sync(); y[i] = own[i ^ 33];": (
            np.arange(64) ^ 33
        ),
        # not read by anybody before both barriers
        "cells[i] = x[i]; block_sync(); y[i] = cells[i ^ 32]; block_sync(); cells[i] = 0;": (
            np.arange(64) ^ 32
        ),
    }
    for seed, (body, expected) in enumerate(bodies.items()):
        np.testing.assert_array_equal(run_small(body, seed=seed)[:64], expected)


def test_orders_of_warps_and_blocks_depend_on_the_seed() -> None:
    """Global memory has no stamps: what depends on the order shows by another result."""
    results = {float(run_small("if (i % 32 == 0) y[0] = i;", 1024, seed=s)[0]) for s in range(8)}
    assert len(results) > 1


def test_passes_over_banks_and_sectors_are_counted() -> None:
    count = emulator.Traffic
    bodies = {
        "cells[i] = 0;": {"shared write": count(1, 128, 1, 1)},
        "cells[2 * i] = 0;": {"shared write": count(1, 128, 2, 1)},
        "cells[i * 33 % 256] = 0;": {"shared write": count(1, 128, 1, 1)},
        "if (i < 8) cells[i * 32] = 0;": {"shared write": count(1, 32, 8, 1)},
        "((float4*)cells)[i] = {};": {"shared write": count(1, 512, 4, 4)},
        "((float4*)cells)[i % 8 * 8 + i / 8] = {};": {"shared write": count(1, 512, 32, 4)},
        "float4 v = {x[i], 0, 0, x[i]}; ((float4*)cells)[i] = v;": {
            "shared write": count(1, 512, 4, 4),
            "global read": count(1, 128, 4, 4),
        },
        "cells[2 * i] = 0; cells[2 * i + 65] = 0;": {"shared write": count(2, 256, 4, 2)},
        "y[i] = 0;": {"global write": count(1, 128, 4, 4)},
        "y[i + 1] = 0;": {"global write": count(1, 128, 5, 4)},
        "y[i * 8] = 0;": {"global write": count(1, 128, 32, 4)},
        "y[i] = x[0];": {"global write": count(1, 128, 4, 4), "global read": count(1, 128, 1, 1)},
        "copy_async_16(memory + 16 * i, x + 4 * i, i < 16);": {
            "shared write": count(1, 512, 4, 4),
            "copy_async read": count(1, 256, 8, 8),
        },
        "((float4*)cells)[i] = {}; unsigned r[4]; warp_sync();"
        "load_matrix_x4(r, memory + 16 * i);": {
            "shared write": count(1, 512, 4, 4),
            "load_matrix read": count(1, 512, 4, 4),
        },
        "((float4*)cells)[i] = {}; unsigned r[2]; warp_sync();"
        "load_matrix_x2(r, memory + 64 * (i % 8));": {
            "shared write": count(1, 512, 4, 4),
            "load_matrix read": count(1, 256, 8, 2),
        },
    }
    for body, expected in bodies.items():
        traffic, _ = emulator.count_traffic(small(body, threads=32), arrays(), {})
        assert {
            way: counts for way, counts in traffic.items() if counts.instructions
        } == expected, body


def test_multiplications_of_tensor_cores_are_counted() -> None:
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal((count, 160)).astype(np.float16) for count in (100, 72))
    operands = [x, w, np.zeros((100, 72), np.float32)]
    _, done = emulator.count_traffic(product(), operands, {"rows": 100, "n": 72, "k": 160})
    assert done == 128 * 128 * 160, "whole tiles of 64 × 64"


def test_launches_leave_no_mappings_behind() -> None:
    """A process may have 65530 of them, and hundreds of libraries."""
    run_small("if (i < 256) y[i] = x[i];", 1024)
    before = len(Path("/proc/self/maps").read_text().splitlines())
    for seed in range(3):
        run_small("if (i < 256) y[i] = x[i];", 1024, seed)
    assert len(Path("/proc/self/maps").read_text().splitlines()) < before + 20


def test_stack_that_is_used_up_is_found() -> None:
    with pytest.raises(emulator.EmulationError, match="bytes of stack"):
        run_small("volatile float many[32760]; for (int k = 0; k < 32760; ++k) many[k] = k;", 1)


def test_libraries_are_not_taken_from_a_place_of_somebody_else(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    folder = emulator.kept()
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
    folder.rename(tmp_path / "other")
    folder.symlink_to(tmp_path / "other")
    with pytest.raises(PlatformError, match="belongs to another user"):
        emulator.kept()
