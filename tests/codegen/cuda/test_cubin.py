"""What a cubin says of its kernels is what nvcc says of them; kernels fit into the rows' GPUs."""

from __future__ import annotations

import pytest

from bertile.base.errors import BertileError, PlatformError
from bertile.codegen.cuda import compiler, cubin
from bertile.targets.rows import TABLE, resolve

ROWS = [row.name for row in TABLE if row.gpu]
SOURCE = """
extern "C" __global__ void __launch_bounds__(128) product(const unsigned* x, float* y, int n) {
  __shared__ unsigned tile[512];
  unsigned a[4], b[2];
  tile[threadIdx.x] = x[threadIdx.x];
  block_sync();
  load_matrix_x4(a, tile + threadIdx.x % 32 * 4);
  b[0] = x[n];
  b[1] = x[n + 1];
  float d[4] = {0, 0, 0, 0};
  mma_16816<f16>(d, a, b);
  int e[4] = {0, 0, 0, 0};
  mma_16832_u8s8(e, a, b);
  y[threadIdx.x] = d[0] + d[1] + d[2] + d[3] + e[0] + e[1] + e[2] + e[3];
}
extern "C" __global__ void indexed(float* x, int n) {
  float values[64];
  for (int i = 0; i < 64; i++) values[i] = x[i * n];
  for (int i = 0; i < n; i++) values[i * 7 & 63] += values[n & 63];
  for (int i = 0; i < 64; i++) x[i] = values[i];
}
"""
# A tile of 16 × 8 × 16 is two instructions on sm_75, and one of 16 × 8 × 32 bytes four.
TENSOR = {"cuda-sm75": {"HMMA": 2, "IMMA": 4}}


@pytest.fixture(scope="module")
def compilers():
    tools = [tool for tool in (compiler.nvcc(), compiler.nvrtc()) if tool]
    assert tools, "neither nvcc nor NVRTC: pip install 'bertile[cuda]'"
    return tools


@pytest.mark.parametrize("row", ROWS)
def test_a_cubin_has_each_kernels_resources_and_tensor_core_instructions(row, compilers):
    for tool in compilers:
        data = tool.run(compiler.prelude() + SOURCE, compiler.machine(resolve(row)))
        kernels = cubin.read(data)
        assert set(kernels) == {"product", "indexed"}
        product, indexed = kernels["product"], kernels["indexed"]
        wanted = TENSOR.get(row, {"HMMA": 1, "IMMA": 1})
        assert {name: product.instructions[name] for name in wanted} == wanted
        assert product.tensor == sum(wanted.values())
        assert product.instructions["LDSM"] >= 1
        assert (product.shared, product.local) == (2048, 0)
        assert (indexed.shared, indexed.local, indexed.tensor) == (0, 256, 0)
        assert indexed.instructions["LDL"] >= 64 and indexed.instructions["STL"] >= 1
        assert 8 < product.registers <= 255 and 8 < indexed.registers <= 255


def test_what_is_no_cubin_is_refused():
    with pytest.raises(ValueError, match="no ELF file"):
        cubin.read(b"\0" * 64)


def test_ptx_is_for_the_oldest_gpu_that_the_kernels_are_written_for(compilers):
    for tool in compilers:
        for row, level in (("cuda-sm75", "sm_75"), ("cuda-sm90", "sm_80")):
            text = tool.run('extern "C" __global__ void f() {}', compiler.virtual(resolve(row)))
            assert f".target {level}".encode() in text


def test_compile_keeps_what_it_has_made(compilers, tmp_path):
    row = resolve("cuda-sm80")
    source = 'extern "C" __global__ void f(float* x) { x[0] = to_float(f16()); }'
    first = compiler.compile(source, row, str(tmp_path), compilers[-1])
    again = compiler.compile(source, row, str(tmp_path), compiler.Compiler(first.compiler, _never))
    assert again.cubin == first.cubin and again.ptx == first.ptx
    assert list(cubin.read(first.cubin)) == ["f"]


def _never(source: str, architecture: str) -> bytes:
    raise AssertionError("this is compiled already")


def test_a_compilers_complaint_is_shown(compilers, tmp_path):
    for tool in compilers:
        with pytest.raises(BertileError, match=r'kernels for sm_80:(?s:.*)"unknown" is undefined'):
            compiler.compile("int x = unknown;", resolve("cuda-sm80"), str(tmp_path), tool)


def test_a_machine_without_a_compiler_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    monkeypatch.setattr(compiler.util, "find_spec", lambda name: None)
    with pytest.raises(PlatformError, match=r"from 12.0 to 13.0 was found; pip install 'bertile"):
        compiler.find()
