"""The library in the place of the driver: what it runs, what it refuses, what it counts."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
from helpers.fake_driver import build_driver

from bertile import cuda_loader
from bertile.run.cuda import emulator

SOURCE = """
extern "C" __global__ void __launch_bounds__(64) add(const float* x, float* y, int n, float by) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[i] + by;
}
extern "C" __global__ void large(float* y) {
  SHARED_MEMORY(memory);
  ((float*)memory)[threadIdx.x] = threadIdx.x;
  y[threadIdx.x] = ((float*)memory)[threadIdx.x];
}
"""
PTX = b"""
.version 8.0
.target sm_80
.address_size 64
.visible .entry add() { ret; }
.visible .entry large() { ret; }
.visible .entry absent() { ret; }
"""


class Driver:
    """The fake driver with a current context, and what tests say to it in few words."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.library.fake_reason.restype = ctypes.c_char_p
        self.library.fake_bytes.restype = ctypes.c_size_t
        self("cuInit", 0)
        self.context = self.handle("cuDevicePrimaryCtxRetain", 0)
        self("cuCtxPushCurrent_v2", self.context)

    def __call__(self, name: str, *arguments: object) -> None:
        code = getattr(self.library, name)(*arguments)
        assert code == 0, (name, code, self.library.fake_reason())

    def refuses(self, code: int, reason: str, name: str, *arguments: object) -> None:
        assert getattr(self.library, name)(*arguments) == code
        assert reason in self.library.fake_reason().decode()

    def handle(self, name: str, *arguments: object) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        self(name, ctypes.byref(handle), *arguments)
        return handle

    def memory(self, count: int) -> ctypes.c_uint64:
        address = ctypes.c_uint64()
        self("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(count))
        return address

    def up(self, array: np.ndarray) -> ctypes.c_uint64:
        address = self.memory(array.nbytes)
        self("cuMemcpyHtoD_v2", address, array.ctypes.data_as(ctypes.c_void_p), _size(array))
        return address

    def down(self, address: ctypes.c_uint64, array: np.ndarray) -> np.ndarray:
        self("cuMemcpyDtoH_v2", array.ctypes.data_as(ctypes.c_void_p), address, _size(array))
        return array


def _size(array: np.ndarray) -> ctypes.c_size_t:
    return ctypes.c_size_t(array.nbytes)


def arguments(*values: object) -> ctypes.Array:
    kept = (ctypes.c_void_p * len(values))(*[ctypes.addressof(value) for value in values])
    kept.values = values  # as long as the array lives
    return kept


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("driver")
    return build_driver(directory), emulator.build(SOURCE, directory)


@pytest.fixture
def driver(built: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    monkeypatch.setenv("BERTILE_EMULATED_KERNELS", str(built[1]))
    own = tmp_path / "libcuda.so.1"  # another file: another library, with its own state
    own.write_bytes(built[0].read_bytes())
    return Driver(ctypes.CDLL(str(own)))


def function(driver: Driver, name: bytes) -> ctypes.c_void_p:
    return driver.handle("cuModuleGetFunction", driver.handle("cuModuleLoadData", PTX), name)


def launch(
    driver: Driver, kernel: ctypes.c_void_p, pointers: ctypes.Array, **changes: object
) -> tuple:
    grid, block = changes.get("grid", (2, 1, 1)), changes.get("block", (64, 1, 1))
    shape = (*grid, *block, changes.get("shared", 0))
    return ("cuLaunchKernel", kernel, *shape, changes.get("stream"), pointers, None)


def test_every_function_that_the_loader_calls_is_there(driver: Driver) -> None:
    assert [name for name in cuda_loader.FUNCTIONS if not hasattr(driver.library, name)] == []


def test_kernel_runs_and_memory_is_counted(driver: Driver) -> None:
    x = np.arange(100, dtype=np.float32)
    from_, to = driver.up(x), driver.memory(400)
    assert driver.library.fake_live(b"memory") == 2 and driver.library.fake_bytes() == 800
    pointers = arguments(from_, to, ctypes.c_int(100), ctypes.c_float(0.5))
    driver(*launch(driver, function(driver, b"add"), pointers))
    np.testing.assert_array_equal(driver.down(to, np.empty_like(x)), x + 0.5)
    driver("cuMemFree_v2", from_)
    assert driver.library.fake_live(b"memory") == 1 and driver.library.fake_bytes() == 400
    assert driver.library.fake_calls(b"cuLaunchKernel") == 1


def test_misuse_is_refused(driver: Driver) -> None:
    add, large = function(driver, b"add"), function(driver, b"large")
    memory = driver.memory(400)
    pointers = arguments(memory, memory, ctypes.c_int(100), ctypes.c_float(0))
    module = driver.handle("cuModuleLoadData", PTX)
    out, buffer = ctypes.byref(ctypes.c_void_p()), ctypes.create_string_buffer(500)
    driver.refuses(1, "blocks of 1025", *launch(driver, add, pointers, block=(1025, 1, 1)))
    driver.refuses(1, "grid of 2 × 65536", *launch(driver, add, pointers, grid=(2, 65536, 1)))
    driver.refuses(1, "of 49152 it may", *launch(driver, large, pointers, shared=49168))
    driver.refuses(1, "of 232448", "cuFuncSetAttribute", large, 8, 232449)
    driver.refuses(400, "no function", *launch(driver, memory, pointers))
    driver.refuses(400, "no stream", *launch(driver, add, pointers, stream=memory))
    driver.refuses(500, "emulated kernels lack", "cuModuleGetFunction", out, module, b"absent")
    driver.refuses(500, "has no kernel", "cuModuleGetFunction", out, module, b"unknown")
    driver.refuses(200, "neither", "cuModuleLoadData", out, b"text")
    driver.refuses(1, "404 bytes to", "cuMemcpyHtoD_v2", memory, buffer, ctypes.c_size_t(404))
    driver("cuMemFree_v2", memory)
    driver.refuses(1, "freed before", "cuMemFree_v2", memory)
    driver.refuses(1, "4 bytes from", "cuMemcpyDtoH_v2", buffer, memory, ctypes.c_size_t(4))
    driver("cuCtxPopCurrent_v2", None)
    driver.refuses(201, "no current context", "cuCtxSynchronize")


def test_code_for_a_newer_card_is_refused(driver: Driver) -> None:
    driver.library.fake_device(75, ctypes.c_size_t(1000))
    driver.refuses(209, "sm_80 on sm_75", "cuModuleLoadData", ctypes.byref(ctypes.c_void_p()), PTX)
    address = ctypes.byref(ctypes.c_uint64())
    driver.refuses(2, "full", "cuMemAlloc_v2", address, ctypes.c_size_t(1001))


def test_kernel_that_writes_beyond_its_array_breaks_the_device(driver: Driver) -> None:
    add, memory = function(driver, b"add"), driver.memory(400)
    pointers = arguments(memory, memory, ctypes.c_int(101), ctypes.c_float(0))
    driver.refuses(700, "4 bytes at byte 400 of an array of 400", *launch(driver, add, pointers))
    assert driver.library.cuCtxSynchronize() == 700, "as every call that follows"
    driver.library.fake_mend()
    driver("cuCtxSynchronize")


def test_graph_keeps_its_arguments_and_runs_in_any_order_of_its_edges(driver: Driver) -> None:
    add = function(driver, b"add")
    places = [driver.up(np.zeros(64, np.float32)) for _ in range(3)]
    stream, graph = driver.handle("cuStreamCreate", 1), driver.handle("cuGraphCreate", 0)

    def node(begin: int, end: int, by: float, before: list[ctypes.c_void_p]) -> ctypes.c_void_p:
        pointers = arguments(places[begin], places[end], ctypes.c_int(64), ctypes.c_float(by))
        params = cuda_loader.KernelNode(
            add.value, (1, 1, 1), (64, 1, 1), 0, ctypes.addressof(pointers), None
        )
        params.pointers = pointers
        edges = (ctypes.c_void_p * max(1, len(before)))(*[handle.value for handle in before])
        count = ctypes.c_size_t(len(before))
        return driver.handle("cuGraphAddKernelNode", graph, edges, count, ctypes.byref(params))

    first = node(0, 1, 1.0, [])
    node(1, 2, 10.0, [first])
    executable = driver.handle("cuGraphInstantiateWithFlags", graph, ctypes.c_ulonglong(0))
    driver("cuGraphLaunch", executable, stream)
    driver("cuStreamSynchronize", stream)
    assert set(driver.down(places[2], np.empty(64, np.float32))) == {11}
    node(2, 1, 100.0, [])  # not ordered with the others: sometimes before, sometimes after
    loose = driver.handle("cuGraphInstantiateWithFlags", graph, ctypes.c_ulonglong(0))
    results = set()
    for _ in range(40):
        driver("cuGraphLaunch", loose, stream)
        results.add(float(driver.down(places[2], np.empty(64, np.float32))[0]))
    assert len(results) > 1


def test_lazy_driver_runs_nothing_before_somebody_waits(driver: Driver) -> None:
    driver.library.fake_lazy(1)
    pinned = driver.handle("cuMemHostAlloc", ctypes.c_size_t(256), 0)
    host = np.frombuffer((ctypes.c_uint8 * 256).from_address(pinned.value), np.float32)
    host[:] = 1
    device, copied = driver.memory(256), driver.memory(256)
    first, second = (driver.handle("cuStreamCreate", 1) for _ in range(2))
    event = driver.handle("cuEventCreate", 2)
    driver("cuMemcpyHtoDAsync_v2", device, pinned, ctypes.c_size_t(256), first)
    driver("cuEventRecord", event, first)
    driver("cuStreamWaitEvent", second, event, 0)
    driver("cuMemcpyDtoDAsync_v2", copied, device, ctypes.c_size_t(256), second)
    host[:] = 2  # too early: the copy has not run
    assert driver.library.cuEventQuery(event) == 600
    driver("cuStreamSynchronize", second)
    assert set(driver.down(copied, np.empty(64, np.float32))) == {2}
