"""wgmma under the emulator: descriptors, sums that land late, the mistakes that it must find."""

from __future__ import annotations

import numpy as np
import pytest

from bertile.run.cuda import emulator
from bertile.schedules.cuda.source import Kernel, Launch

# y (rows, n) = x (rows, k) · w (n, k): 64 × WIDTH per warpgroup of 128, 128 bytes of k a stage.
PRODUCT = """
constexpr int X = 64 * 128, W = WIDTH * 128, STAGE = X + W;
extern "C" __global__ void __launch_bounds__(128)
product(const CELL* x, const CELL* w, SUM* y, int rows, int n, int k) {
  SHARED_MEMORY(memory);
  const int row0 = blockIdx.x * 64, column0 = blockIdx.y * WIDTH, cells = 128 / sizeof(CELL);
  SUM d[WIDTH / 2];
  auto load = [&](int step) {
    for (int i = threadIdx.x; step * cells < k && i < (64 + WIDTH) * 8; i += 128) {
      const int row = i / 8, r = row < 64 ? row0 + row : column0 + row - 64;
      const CELL* from = (row < 64 ? x : w) + r * k + step * cells + i % 8 * (cells / 8);
      unsigned char* to = memory + step % 3 * STAGE + (row < 64 ? 0 : X);
      copy_async_16(to + swizzled(row < 64 ? row : row - 64, i % 8 * 16), from,
                    r < (row < 64 ? rows : n));
    }
    copy_commit();
  };
  load(0);
  for (int step = 0; step * cells < k; ++step) {
    load(step + 1);
    copy_wait<1>();
    shared_fence();
    block_sync();
    const unsigned char* a = memory + step % 3 * STAGE;
    wgmma_keep(d);
    wgmma_fence();
    for (int i = 0; i < 4; ++i)
      RUN(d, wgmma_matrix(a + 32 * i), wgmma_matrix(a + X + 32 * i), step > 0 || i > 0);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_keep(d);
  }
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int i = 0; i < WIDTH / 2; ++i) {
    const int r = row0 + warp * 16 + lane / 4 + i / 2 % 2 * 8;
    const int c = column0 + i / 4 * 8 + lane % 4 * 2 + i % 2;
    if (r < rows && c < n) y[r * n + c] = d[i];
  }
}
"""
RUNS = {
    "f16": ("f16", "float", "wgmma<f16, WIDTH>"),
    "bf16": ("bf16", "float", "wgmma<bf16, WIDTH>"),
    "u8": ("u8", "int", "wgmma_u8s8<WIDTH>"),
}


def source(kind: str, width: int, text: str = PRODUCT) -> str:
    cell, total, run = RUNS[kind]
    words = {"CELL": cell, "SUM": total, "RUN": run}
    for name, word in words.items():
        text = text.replace(name, word)
    return text.replace("WIDTH", str(width))


def run_product(
    kind: str, width: int, text: str = PRODUCT, k: int = 384
) -> tuple[np.ndarray, np.ndarray]:
    rng, rows, n = np.random.default_rng(0), 100, width + 24
    if kind == "u8":
        x = rng.integers(0, 256, (rows, k)).astype(np.uint8)
        w = rng.integers(-128, 128, (n, k)).astype(np.int8)
        expected = x.astype(np.int32) @ w.astype(np.int32).T
        operands = [x, w]
    else:
        x, w = (rng.integers(-8, 9, (count, k)).astype(np.float32) for count in (rows, n))
        expected = x @ w.T
        narrow = (lambda a: a.astype(np.float16)) if kind == "f16" else _bf16
        operands = [narrow(x), narrow(w)]
    y = np.zeros_like(expected)
    names = ("x", "w", "y", "rows", "n", "k")
    launch = Launch(
        "product", (2, f"(n + {width - 1}) // {width}", 1), 128, 3 * (64 + width) * 128, names
    )
    kernel = Kernel(source(kind, width, text), names[:3], (launch,))
    emulator.run_kernel(kernel, [*operands, y], {"rows": rows, "n": n, "k": k})
    return y, expected


def _bf16(array: np.ndarray) -> np.ndarray:
    return (array.view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize(("kind", "width"), [("f16", 64), ("bf16", 192), ("u8", 128)])
def test_product_equals_numpy(kind: str, width: int) -> None:
    actual, expected = run_product(kind, width)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
    ("right", "wrong", "mistake"),
    [
        ("wgmma_wait<0>();", "", "wgmma without a wgmma_fence|under way"),
        ("wgmma_fence();", "", "wgmma without a wgmma_fence"),
        ("shared_fence();", "", "without a shared_fence behind it"),
        ("block_sync();", "", "race|nothing was written|before copy_wait"),
        ("copy_wait<1>();", "", "before copy_wait"),
        ("step % 3", "step % 2", "race: writes"),
        ("wgmma_matrix(a + 32 * i)", "wgmma_matrix(a + 128 + 32 * i)", "not in the first row"),
        ("if (r < rows", "if (warp == 3) RUN(d, 0, 0, 1); if (r < rows", "without a wgmma_fence"),
    ],
)
def test_mistake_is_found(right: str, wrong: str, mistake: str) -> None:
    assert right in PRODUCT
    with pytest.raises(emulator.EmulationError, match=mistake):
        run_product("f16", 64, PRODUCT.replace(right, wrong))


def test_sum_that_is_read_before_the_wait_is_nan() -> None:
    actual, _ = run_product("f16", 64, PRODUCT.replace("wgmma_wait<0>();", ""), k=64)
    assert np.isnan(actual).all()


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_every_layout_of_a_descriptor_is_read_as_ptx_lays_it_out(mode: int) -> None:
    """A product whose a lies in the layout, placed here by the words of the PTX manual."""
    text = """
extern "C" __global__ void read(const u8* image, float* y, int leading, int stride, int mode) {
  SHARED_MEMORY(memory);
  for (int i = threadIdx.x; i < 16384; i += 128) memory[i] = image[i];
  shared_fence();
  block_sync();
  float d[32];
  unsigned long long a = (unsigned long long)(leading / 16) << 16 |
                         (unsigned long long)(stride / 16) << 32 | (unsigned long long)mode << 62;
  wgmma_fence();
  wgmma<f16, 64>(d, a, wgmma_matrix(memory + 8192), false);
  wgmma_commit();
  wgmma_wait<0>();
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
  for (int i = 0; i < 32; ++i)
    y[(row + i / 2 % 2 * 8) * 64 + i / 4 * 8 + lane % 4 * 2 + i % 2] = d[i];
}
"""
    rng = np.random.default_rng(0)
    a, image = rng.integers(-9, 9, (64, 16)).astype(np.float16), np.zeros(16384, np.uint8)
    identity = np.eye(64, 16).astype(np.float16)
    pitch = {0: 16, 1: 128, 2: 64, 3: 32}[mode]
    leading, stride = (2048, 256) if mode == 0 else (16, 8 * pitch)
    for row in range(64):
        for chunk in range(2):  # of 16 bytes
            place = row // 8 * stride + row % 8 * pitch
            place += chunk * leading if mode == 0 else chunk * 16
            # a pattern of 8 rows: chunks change places by the number of their line of 128 bytes
            line = place // 128 % (pitch // 16)
            place ^= 16 * line if mode else 0
            cells = a[row, 8 * chunk : 8 * chunk + 8]
            image[place : place + 16] = cells.view(np.uint8)
            b = 8192 + row * 128 + ((chunk ^ row % 8) * 16)
            image[b : b + 16] = identity[row, 8 * chunk : 8 * chunk + 8].view(np.uint8)
    y = np.zeros((64, 64), np.float32)
    names = ("image", "y", "leading", "stride", "mode")
    kernel = Kernel(text, names[:2], (Launch("read", (1, 1, 1), 128, 16384, names),))
    emulator.run_kernel(kernel, [image, y], {"leading": leading, "stride": stride, "mode": mode})
    np.testing.assert_array_equal(y, a.astype(np.float32) @ identity.astype(np.float32).T)
