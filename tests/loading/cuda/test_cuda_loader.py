"""The CUDA loader: numbers, graphs, memory, streams and refusals, on a driver made of Python."""

from __future__ import annotations

import ast
import copy
import ctypes
import gc
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from helpers import changed_bundles, lazy_driver
from helpers.fake_driver import build_driver

from bertile import cuda_loader, loader
from bertile.base.errors import BertileError, BundleError, InputError, PlatformError
from bertile.bundle import one_file
from bertile.bundle import writer as bundle
from bertile.loading.cuda import device_array, workspace
from bertile.loading.cuda import model as gpu_model
from bertile.loading.cuda import request as gpu_request
from bertile.loading.interface import interface

RNG = np.random.default_rng(0)
PARAMS = {
    "words": RNG.standard_normal((50, 8), dtype=np.float32),
    "types": RNG.standard_normal((2, 8), dtype=np.float32),
    "scale": RNG.standard_normal(8, dtype=np.float32),
}
NAMES = ("input_ids", "attention_mask", "token_type_ids")
MANIFEST = {
    "bertile": "0.1.0",
    "entry": "main",
    "model": {"source": "tiny", "family": "bert", "head": "encoder", "max_length": 64},
    "target": {"name": "cuda-sm90", "arch": "cuda", "features": ["sm_90"]},
    "lanes": 16,
    "inputs": [
        {"name": "input_ids", "dtype": "int64", "below": 50, "default": None},
        {"name": "attention_mask", "dtype": "int64", "below": 2, "default": "ones"},
        {"name": "token_type_ids", "dtype": "int64", "below": 2, "default": "zeros"},
    ],
    "outputs": [
        {"name": "hidden", "dtype": "float32", "axes": ["batch", "length", 8]},
        {"name": "pooled", "dtype": "float32", "axes": ["batch", 8]},
    ],
    "static": {"batch": None, "length": None},
}
ROWS = ["int32", "16*blocks"]
SIZES = [["int32", "batch"], ["int32", "length"], ["int32", "blocks"]]
PLAN = {
    "schema": 1,
    "inputs": [
        *({"name": name, "dtype": "int64", "shape": ["batch", "length"]} for name in NAMES),
        {"name": "blocks", "dtype": "int32", "shape": ["blocks", 4]},
    ],
    "weights": list(PARAMS),
    "buffers": [
        {"bytes": "blocks*16*8*4"},
        {"bytes": "blocks*16*4"},
        {"bytes": "blocks*16*8*4"},
        {"bytes": "batch*length*8*4"},
        {"bytes": "batch*8*4"},
    ],
    "outputs": [
        {"name": "hidden", "dtype": "float32", "shape": ["batch", "length", 8], "buffer": 3},
        {"name": "pooled", "dtype": "float32", "shape": ["batch", 8], "buffer": 4},
    ],
    "steps": [
        {
            "entry": "embed", "grid": ["blocks", 1, 1], "threads": 128, "shared": 0,
            "arguments": [["input", 0], ["input", 2], ["input", 3], ["weight", 0], ["weight", 1],
                          ["buffer", 0], *SIZES],
        },
        {
            "entry": "keys", "grid": ["blocks", 1, 1], "threads": 32, "shared": 0,
            "arguments": [["input", 1], ["input", 3], ["buffer", 1], *SIZES],
        },
        {
            "entry": "scaled", "grid": ["blocks", 1, 1], "threads": 128, "shared": 100000,
            "arguments": [["buffer", 0], ["weight", 2], ["buffer", 2], ROWS, ["float32", 0.5]],
        },
        {
            "entry": "hidden", "grid": ["batch", "(length+15)//16", 1], "threads": 128, "shared": 0,
            "arguments": [["buffer", 2], ["input", 3], ["buffer", 3], *SIZES],
        },
        {
            "entry": "pooled", "grid": ["batch", 1, 1], "threads": 32, "shared": 0,
            "when": "batch < 1000",
            "arguments": [["buffer", 2], ["buffer", 1], ["input", 3], ["buffer", 4], *SIZES],
        },
    ],
}  # fmt: skip


# -- kernels -----------------------------------------------------------------------------------


def at(address, shape, dtype=np.float32):
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype).reshape(shape)


def places(table, blocks):
    """(row of the batch, positions) of each block of tokens."""
    return [(row, first + np.arange(16)) for row, first, _, _ in at(table, (blocks, 4), np.int32)]


def embed(grid, block, cells):
    ids, types, table, words, kinds, out, batch, length, blocks = cells
    ids, types = (at(pointer, (batch, length), np.int64) for pointer in (ids, types))
    words, kinds = at(words, (50, 8)), at(kinds, (2, 8))
    assert grid == (blocks, 1, 1) and block == (128, 1, 1)
    for index, (row, positions) in enumerate(places(table, blocks)):
        taken = np.minimum(positions, length - 1)
        at(out, (blocks, 16, 8))[index] = words[ids[row, taken]] + kinds[types[row, taken]]


def keys(grid, block, cells):
    mask, table, out, batch, length, blocks = cells
    mask = at(mask, (batch, length), np.int64)
    for index, (row, positions) in enumerate(places(table, blocks)):
        inside = positions < length
        at(out, (blocks, 16))[index] = inside & (mask[row, np.minimum(positions, length - 1)] != 0)


def scaled(grid, block, cells):
    x, scale, out, rows, half = cells
    factor = np.uint32(half).view(np.float32)
    at(out, (rows, 8))[...] = at(x, (rows, 8)) * at(scale, 8) * factor


def hidden(grid, block, cells):
    x, table, out, batch, length, blocks = cells
    result = at(out, (batch, length, 8))
    result[...] = 0
    for index, (row, positions) in enumerate(places(table, blocks)):
        inside = positions < length
        result[row, positions[inside]] = at(x, (blocks, 16, 8))[index][inside]


def pooled(grid, block, cells):
    x, used, table, out, batch, _, blocks = cells
    result = at(out, (batch, 8))
    result[...] = 0
    for index, (row, _) in enumerate(places(table, blocks)):
        result[row] += at(used, (blocks, 16))[index] @ at(x, (blocks, 16, 8))[index]


KERNELS = {kernel.__name__: kernel for kernel in (embed, keys, scaled, hidden, pooled)}
for step in PLAN["steps"]:
    KERNELS[step["entry"]].arguments = len(step["arguments"])


def expected(input_ids, attention_mask=None, token_type_ids=None):
    ids = np.asarray(input_ids)
    mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask)
    types = np.zeros_like(ids) if token_type_ids is None else np.asarray(token_type_ids)
    x = (PARAMS["words"][ids] + PARAMS["types"][types]) * PARAMS["scale"] * np.float32(0.5)
    behind = np.arange(ids.shape[1]) >= loader.sequence_ends(mask)[:, None]
    return {
        "hidden": np.where(behind[..., None], 0, x),
        "pooled": (x * (mask != 0)[..., None]).sum(axis=1),
    }


def same(got, wanted):
    for name, array in wanted.items():
        np.testing.assert_allclose(got[name], array, rtol=1e-5, atol=1e-5)


def request(batch, length, seed=0):
    rng = np.random.default_rng(seed)
    ends = rng.integers(1, length + 1, batch)
    mask = (np.arange(length) < ends[:, None]).astype(np.int64)
    mask[:, 0] &= rng.integers(0, 2, batch)  # holes, and rows without a token
    return {
        "input_ids": rng.integers(0, 50, (batch, length)),
        "attention_mask": mask,
        "token_type_ids": rng.integers(0, 2, (batch, length)),
    }


# -- bundles and drivers -----------------------------------------------------------------------

PTX = "//\n.version 8.3\n.target sm_80\n.address_size 64\n"


def write(directory, plan=PLAN, manifest=MANIFEST, ptx=PTX):
    """A bundle as the builder writes one for a GPU."""
    library = directory.with_name(f"{directory.name}.cubin")
    library.write_bytes(b"cubin")

    def add(place):
        (place / "lib.so").rename(place / "kernels.cubin")
        (place / "plan.json").write_text(json.dumps(plan))
        if ptx:
            (place / "kernels.ptx").write_text(ptx)
        bundle.include_loaders(place)

    return bundle.write(manifest, library, PARAMS, [], directory, add)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A bundle; not to be changed."""
    return write(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture
def install(monkeypatch):
    """Puts a driver in the place of the machine's; no test may use one wrongly."""
    drivers = []

    def put(driver):
        monkeypatch.setattr(gpu_model, "open_driver", lambda path: driver)
        drivers.append(driver)
        return driver

    yield put
    for driver in drivers:
        assert driver.misuse == []


@pytest.fixture
def driver(install):
    return install(lazy_driver.Driver(KERNELS))


@pytest.fixture
def model(driver, directory):
    with loader.load(directory) as loaded:
        yield loaded


# -- pickling ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_a_model_that_is_pickled_or_copied_is_another_one_of_its_directory(
    driver, directory, again
):
    with cuda_loader.load(directory, 0, streams=2) as model, again(model) as other:
        assert other is not model and other._streams == 2
        assert other.gpu is not model.gpu and other.gpu.ordinal == 0
        same(other(**request(2, 5)), expected(**request(2, 5)))


def test_the_pickle_of_a_model_has_its_device_and_its_driver(directory, monkeypatch):
    asked = []

    def open_driver(path):
        asked.append(path)
        return lazy_driver.Driver(KERNELS)

    monkeypatch.setattr(gpu_model, "open_driver", open_driver)
    with cuda_loader.load(directory, 0, "a/driver.so") as model:
        function, arguments = model.__reduce__()
        load, seal = arguments
        assert (load.args, seal) == ((directory, 0, "a/driver.so"), model.manifest["sha256"])
        function(*arguments).close()
    assert asked == ["a/driver.so"] * 2


def test_a_closed_model_is_not_pickled(driver, directory):
    model = cuda_loader.load(directory)
    model.close()
    with pytest.raises(BertileError, match="the model is closed"):
        pickle.dumps(model)


# -- numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 16), (1, 17), (3, 5), (7, 40), (2, 64)])
def test_call_equals_numpy(model, batch, length):
    for seed in range(3):
        inputs = request(batch, length, seed)
        same(model(**inputs), expected(**inputs))


def test_call_takes_lists_and_other_integers(model):
    same(model(input_ids=[[1, 2, 3]]), expected([[1, 2, 3]]))
    ids = np.arange(24, dtype=np.uint8).reshape(4, 6)[:, ::2]
    mask = ids % 2 == 0
    same(model(input_ids=ids, attention_mask=mask), expected(ids, mask))


def test_call_warns_of_padding_that_no_mask_marks(model):
    model.manifest["text"] = {"padding_id": 0}
    model.manifest["files"]["tokenizer.json"] = {}
    ids = [[5, 6, 0]]
    with pytest.warns(UserWarning, match="have padding .id 0. and there is no attention_mask"):
        model(input_ids=ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=ids, attention_mask=[[1, 1, 0]])
        model(input_ids=[[5, 6, 7]])


def test_call_gives_arrays_that_later_calls_leave_alone(model):
    first = model(**request(2, 5, 1))
    model(**request(2, 5, 2))
    same(first, expected(**request(2, 5, 1)))


def test_a_long_batch_takes_several_passes(model, monkeypatch, driver):
    monkeypatch.setattr(gpu_request, "PASS_BLOCKS", 4)
    inputs = request(9, 30)
    same(model(**inputs), expected(**inputs))
    assert driver.calls["cuGraphLaunch"] > 2
    with pytest.raises(InputError, match="takes several passes; time a smaller one"):
        model.time(**inputs)


@pytest.mark.parametrize("static", [{"batch": 4, "length": 20}, {"batch": None, "length": 64}])
def test_static_shapes_are_padded_to_and_cut_back(static, driver, tmp_path):
    plan = json.loads(json.dumps(PLAN))
    for array in (*plan["inputs"], *plan["outputs"]):
        array["shape"] = [static.get(size) or size for size in array["shape"]]
    path = write(tmp_path / "static", plan, {**MANIFEST, "static": static})
    with loader.load(path) as model:
        inputs = request(6, 13)
        same(model(**inputs), expected(**inputs))
        with pytest.raises(InputError, match=f"at most {static['length']}|the model takes at most"):
            model(**request(1, 65))


def test_steps_may_be_left_out(driver, tmp_path):
    """A kernel for short inputs and one for long ones, of which each request needs one."""
    plan = json.loads(json.dumps(PLAN))
    embed = plan["steps"][0]
    plan["steps"].insert(1, {**embed, "when": "length >= 16"})
    embed["when"] = "length < 16"
    with loader.load(write(tmp_path / "two", plan)) as model:
        for length in (3, 16, 30):
            inputs = request(2, length)
            same(model(**inputs), expected(**inputs))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_id": [[1]]}, "the model has no input 'input_id'; did you mean 'input_ids'"),
        ({"attention_mask": [[1]]}, "the input input_ids is missing"),
        ({"input_ids": [[1, 50]]}, r"input_ids\[0, 1\] is 50, the model takes 0 to 49"),
        ({"input_ids": [1]}, "input_ids has 1 dimension; give"),
        ({"input_ids": np.ones((1, 65), int)}, "the input has 65 tokens, the model takes at most"),
        ({"input_ids": [[1]], "stream": "main"}, "stream is 'main'; give an integer, or a stream"),
    ],
)
def test_call_refuses_wrong_input(model, inputs, message):
    with pytest.raises(InputError, match=message):
        model(**inputs)


# -- graphs and memory -------------------------------------------------------------------------


def calls_of(driver, call):
    """What `call` calls of the driver."""
    before = driver.calls.copy()
    call()
    return driver.calls - before


def test_a_request_is_one_launch_of_a_graph(model, driver):
    inputs = request(3, 20)
    model(**inputs)
    assert calls_of(driver, lambda: model(**inputs)) == {
        "cuCtxPushCurrent_v2": 1,
        "cuGraphLaunch": 1,
        "cuStreamSynchronize": 1,
        "cuCtxPopCurrent_v2": 1,
    }


def test_thousands_of_calls_hold_their_memory(model, driver):
    requests = [request(1, length) for length in (1, 2, 3, 4)]
    for inputs in requests:
        model(**inputs)
    held = driver.held()
    for number in range(3_000):
        model(**requests[number % 4])
    assert driver.held() == held and driver.calls["cuGraphLaunch"] == 3_004


def test_graphs_of_shapes_that_are_not_used_are_given_back(model, driver, monkeypatch):
    monkeypatch.setattr(workspace, "GRAPHS", 3)
    for length in (60, 1, 2, 3, 2, 60, 3):
        inputs = request(1, length)
        same(model(**inputs), expected(**inputs))
    assert driver.held()["executable"] == 3 and driver.held().get("graph", 0) == 0
    graphs = driver.calls["cuGraphCreate"]
    model(**request(1, 3))
    assert driver.calls["cuGraphCreate"] == graphs
    model(**request(1, 1))
    assert driver.calls["cuGraphCreate"] == graphs + 1


def test_memory_grows_with_the_largest_request_only(model, driver):
    model(**request(1, 4))
    small = driver.held()
    large = request(500, 64)
    same(model(**large), expected(**large))
    grown = driver.held()
    assert grown["device"] > small["device"] and grown["executable"] == 1
    for batch in (1, 300, 499):
        inputs = request(batch, 64)
        same(model(**inputs), expected(**inputs))
    assert {**driver.held(), "executable": 1} == grown


def test_threads_run_at_once_and_share_the_workspaces(driver, directory):
    with cuda_loader.load(directory, streams=3) as model:
        wrong = []

        def ask(seed):
            for turn in range(20):
                inputs = request(2, 3 + (seed + turn) % 5, seed)
                try:
                    same(model(**inputs), expected(**inputs))
                except Exception as error:
                    wrong.append(error)

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == [] and 1 <= driver.held()["stream"] <= 3


def test_close_waits_for_a_call_and_gives_everything_back(driver, directory):
    begun, go = threading.Event(), threading.Event()

    def slow(*arguments):
        begun.set()
        assert go.wait(20)
        return pooled(*arguments)

    slow.arguments = pooled.arguments
    driver.kernels["pooled"] = slow
    model = loader.load(directory)
    results = []
    caller = threading.Thread(target=lambda: results.append(model(**request(2, 5))))
    caller.start()
    assert begun.wait(20)
    closer = threading.Thread(target=model.close)
    closer.start()
    closer.join(0.1)
    assert closer.is_alive()
    go.set()
    caller.join()
    closer.join()
    same(results[0], expected(**request(2, 5)))
    assert driver.held() == {}


def test_a_closed_model_says_so(model, driver):
    model(input_ids=[[1]])
    model.close()
    model.close()
    assert driver.held() == {}
    for call in (model, model.time):
        with pytest.raises(BertileError, match="the model is closed; load the bundle again"):
            call(input_ids=[[1]])


def test_a_model_that_nobody_holds_is_given_back(driver, directory):
    for _ in range(5):
        model = loader.load(directory)
        model(**request(2, 9))
        del model
        gc.collect()
        assert driver.held() == {} and driver.retained == 0


LOADING = ("cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2", "cuMemAlloc_v2", "cuMemHostAlloc",
           "cuStreamCreate", "cuEventCreate", "cuMemcpyHtoDAsync_v2", "cuEventRecord",
           "cuStreamSynchronize", "cuModuleLoadDataEx", "cuModuleGetFunction",
           "cuFuncSetAttribute")  # fmt: skip


@pytest.mark.parametrize("name", LOADING)
def test_a_load_that_fails_leaves_nothing(install, directory, name):
    driver = install(lazy_driver.Driver(KERNELS))
    driver.fail[name] = 999
    with pytest.raises(BertileError, match=r"CUDA_ERROR_UNKNOWN \(unknown error\)"):
        loader.load(directory)
    gc.collect()
    assert driver.held() == {} and driver.retained == 0


CALLING = ("cuCtxPushCurrent_v2", "cuStreamCreate", "cuEventCreate", "cuMemAlloc_v2",
           "cuMemHostAlloc", "cuGraphCreate", "cuGraphAddKernelNode", "cuGraphAddMemcpyNode",
           "cuGraphInstantiateWithFlags", "cuGraphLaunch", "cuStreamSynchronize")  # fmt: skip


@pytest.mark.parametrize("name", CALLING)
def test_a_call_that_fails_leaves_a_model_that_works(model, driver, name):
    inputs = request(3, 6)
    driver.fail[name] = 999
    for _ in range(3):
        with pytest.raises(BertileError, match=f"{name} fails on Lazy GPU: CUDA_ERROR_UNKNOWN"):
            model(**inputs)
    driver.fail.clear()
    same(model(**inputs), expected(**inputs))
    assert driver.held()["stream"] == 1
    model.close()
    assert driver.held() == {}


def test_a_kernel_that_fails_ends_the_use_of_the_gpu(model, driver):
    driver.fail["cuStreamSynchronize"] = 700
    sentence = (
        r"a kernel failed on Lazy GPU: CUDA_ERROR_ILLEGAL_ADDRESS \(an illegal memory access was "
        r"encountered\); start the process again: it has lost the GPU"
    )
    for _ in range(2):
        with pytest.raises(BertileError, match=sentence):
            model(input_ids=[[1]])
    assert driver.calls["cuGraphLaunch"] == 1  # the second call asks the driver nothing
    model.close()


def test_a_call_in_a_forked_process_says_so(model):
    model(input_ids=[[1]])
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            model(input_ids=[[1]])
        except BertileError as error:
            os.write(writer, str(error).encode())
        model.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    os.close(writer)
    with os.fdopen(reader) as pipe:
        assert pipe.read().startswith("the process was forked after the bundle was loaded; load")


def test_time_gives_milliseconds_of_the_graph(model, driver):
    inputs = request(2, 7)
    for copies in (False, True):
        calls = calls_of(
            driver, lambda copies=copies: model.time(repeats=5, warm=2, copies=copies, **inputs)
        )
        assert calls["cuGraphLaunch"] == 7 and calls["cuStreamSynchronize"] == 1
        assert calls["cuGraphAddMemcpyNode"] == 2 * copies
    np.testing.assert_array_equal(model.time(repeats=5, **inputs), np.full(5, 0.5))
    same(model(**inputs), expected(**inputs))
    with pytest.raises(InputError, match="repeats or warm is no count"):
        model.time(repeats=0, **inputs)


# -- arrays on the device ----------------------------------------------------------------------


class OnDevice:
    """An array that another library has on the GPU."""

    def __init__(self, array, device=(2, 0)):
        self.array, self.place, self.streams = array, device, []

    def __dlpack_device__(self):
        return self.place

    def __dlpack__(self, *, stream):
        self.streams.append(stream)
        array = self.array
        sizes = (ctypes.c_int64 * array.ndim)(*array.shape)
        steps = (ctypes.c_int64 * array.ndim)(*(step // array.itemsize for step in array.strides))
        code = {"i": 0, "u": 1, "f": 2}[array.dtype.kind]
        tensor = loader.DLTensor(
            array.ctypes.data, *self.place, array.ndim, code, array.itemsize * 8, 1, sizes, steps
        )
        self.managed = loader.DLManagedTensor(tensor), sizes, steps
        new = ctypes.pythonapi["PyCapsule_New"]
        new.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        new.restype = ctypes.py_object
        return new(ctypes.addressof(self.managed[0]), b"dltensor", None)


class Consumer:
    """What torch.from_dlpack does with a capsule; `array` is its memory."""

    USED = b"used_dltensor"

    def __init__(self, source, stream=1):
        assert source.__dlpack_device__() == (2, 0)
        capsule = source.__dlpack__(stream=stream, max_version=(1, 0))
        pointer, rename = (
            ctypes.pythonapi[f"PyCapsule_{name}"] for name in ("GetPointer", "SetName")
        )
        pointer.argtypes, pointer.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_void_p
        rename.argtypes = (ctypes.py_object, ctypes.c_char_p)
        self.address = pointer(capsule, b"dltensor")
        rename(capsule, self.USED)
        self.managed = loader.DLManagedTensor.from_address(self.address)
        tensor = self.managed.tensor
        assert (tensor.code, tensor.bits, tensor.lanes, tensor.strides.contents if
                tensor.strides else None) == (2, 32, 1, None)  # fmt: skip
        self.array = at(tensor.data, tuple(tensor.shape[: tensor.rank]))

    def close(self):
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.managed.deleter)(self.address)


KEPT = []  # whoever gives an array on the device keeps it until the stream has read it


def device_request(batch, length, seed=0):
    inputs = request(batch, length, seed)
    KEPT.append(inputs)
    return inputs, {name: OnDevice(array) for name, array in inputs.items()}


def on_device(inputs):
    """What the model gives for arrays on the device: there are no ends to the sequences."""
    wanted = expected(inputs["input_ids"], None, inputs.get("token_type_ids"))
    mask = inputs.get("attention_mask", np.ones(wanted["hidden"].shape[:2]))
    return {**wanted, "pooled": (wanted["hidden"] * (mask != 0)[..., None]).sum(axis=1)}


@pytest.mark.parametrize("names", [NAMES, NAMES[:1], NAMES[:2], (NAMES[0], NAMES[2])])
def test_arrays_on_the_device_are_read_in_place(model, driver, names):
    for batch, length, seed in ((2, 5, 1), (3, 17, 2), (2, 5, 3)):
        inputs, tensors = device_request(batch, length, seed)
        results = model(stream=0, **{name: tensors[name] for name in names})
        consumers = {name: Consumer(result) for name, result in results.items()}
        driver.finish()
        same(
            {k: consumer.array for k, consumer in consumers.items()},
            on_device({k: inputs[k] for k in names}),
        )
        assert [tensors[name].streams for name in names] == [[1]] * len(names)
        for consumer in consumers.values():
            consumer.close()


def test_arrays_on_the_device_wait_for_nothing(model, driver):
    stream = driver.stream()
    _, tensors = device_request(2, 5)
    held = []

    def call():
        held.append(model(stream=stream, **tensors))

    call()
    assert calls_of(driver, call) == {
        "cuCtxPushCurrent_v2": 1,
        "cuMemAlloc_v2": 2,  # the first results are still in use
        "cuGraphExecKernelNodeSetParams": 2,
        "cuGraphLaunch": 1,
        "cuEventRecord": 1,
        "cuCtxPopCurrent_v2": 1,
    }
    held.clear()
    call()
    held.clear()
    calls = calls_of(driver, call)
    assert not any("Alloc" in name or "Synchronize" in name or "Memcpy" in name for name in calls)


def test_results_go_back_when_the_last_user_is_gone(model, driver):
    inputs, tensors = device_request(2, 5)
    results = model(**tensors)
    assert repr(results["hidden"]) == "DeviceArray((2, 5, 8), float32, GPU 0)"
    held = driver.held()["device"]
    consumer = Consumer(results["hidden"])
    pointer = results["hidden"].pointer
    del results
    gc.collect()
    again = model(**tensors)
    assert again["hidden"].pointer != pointer
    driver.finish()
    np.testing.assert_allclose(consumer.array, on_device(inputs)["hidden"], rtol=1e-5)
    consumer.close()
    assert model(**tensors)["hidden"].pointer == pointer
    again["pooled"].__dlpack__(stream=-1)  # a capsule that nobody takes
    del again
    gc.collect()
    assert driver.held()["device"] == held + 256 + 512
    assert device_array._exported == {}


def test_results_outlive_the_model(driver, directory):
    inputs, tensors = device_request(2, 5)
    with loader.load(directory) as model:
        results = model(**tensors)
    held = driver.held()
    assert held == {"device": 768}
    del model
    gc.collect()
    assert driver.retained == 1
    np.testing.assert_allclose(
        at(results["pooled"].pointer, (2, 8)), on_device(inputs)["pooled"], rtol=1e-5, atol=1e-6
    )
    del results
    gc.collect()
    assert driver.held() == {} and driver.retained == 0


def test_results_that_were_given_back_are_kept_up_to_a_limit(model, driver, monkeypatch):
    monkeypatch.setattr(device_array, "CACHED", 3)
    held = []
    for batch in range(1, 9):
        held.append(model(**device_request(batch, 3)[1]))
    before = driver.held()["device"]
    held.clear()
    gc.collect()
    assert len([pointer for kept in model._results._free.values() for pointer in kept]) == 3
    assert driver.held()["device"] < before


@pytest.mark.parametrize("workspaces", [1, 2, 4])
def test_streams_wait_for_each_other(driver, directory, workspaces):
    """Three streams whose work is done as late as may be; more or fewer than there are arenas."""
    streams = [driver.stream() for _ in range(3)]
    taken = []
    with cuda_loader.load(directory, streams=workspaces) as model:
        for turn in range(12):
            inputs, tensors = device_request(2, 5, turn)
            results = model(stream=streams[turn % 3], **tensors)
            reader = streams[(turn + 1) % 3]
            consumers = {name: Consumer(result, reader) for name, result in results.items()}
            taken.append((inputs, tensors, consumers, reader))
        assert driver.held()["stream"] - 3 == min(workspaces, 3)
        for inputs, _, consumers, reader in reversed(taken):
            driver._cuStreamSynchronize(reader)
            same({name: consumer.array for name, consumer in consumers.items()}, on_device(inputs))
        for _, _, consumers, _ in taken:
            for consumer in consumers.values():
                consumer.close()


def test_results_lent_to_another_stream_are_not_written_before_it_has_read(model, driver):
    writer, reader = driver.stream(), driver.stream()
    inputs, tensors = device_request(2, 5, 1)
    results = model(stream=writer, **tensors)
    consumer = Consumer(results["hidden"], reader)
    read = []
    driver._get(reader, lazy_driver.Stream).add(lambda: read.append(consumer.array.copy()))
    del results
    consumer.close()
    model(stream=writer, **device_request(2, 5, 2)[1])
    driver._cuStreamSynchronize(writer)
    np.testing.assert_allclose(read[0], on_device(inputs)["hidden"], rtol=1e-5)


def test_calls_from_the_host_and_on_the_device_take_turns(model, driver):
    stream = driver.stream()
    for turn in range(6):
        inputs, tensors = device_request(3, 9, turn)
        results = model(stream=stream, **tensors)
        host = request(3, 9, turn + 100)
        same(model(**host), expected(**host))
        driver._cuStreamSynchronize(stream)
        np.testing.assert_allclose(
            at(results["hidden"].pointer, (3, 9, 8)), on_device(inputs)["hidden"], rtol=1e-5
        )


def test_device_calls_hold_their_memory(model, driver):
    _, tensors = device_request(2, 5)
    model(**tensors)
    model(**tensors)
    gc.collect()
    held = driver.held()
    for _ in range(500):
        consumers = [Consumer(result) for result in model(**tensors).values()]
        driver.finish()
        for consumer in consumers:
            consumer.close()
    del consumers
    gc.collect()
    assert driver.held() == held


def test_streams_are_known_in_every_form():
    class Torch:
        cuda_stream = 4096

    class Cupy:
        ptr = 8192

    forms = {None: 0, 0: 0, 1: 0, 2: 2, 4096: 4096, Torch(): 4096, Cupy(): 8192}
    assert [device_array.stream_handle(form) for form in forms] == list(forms.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g.update(input_ids=OnDevice(np.ones((2, 5), np.int32))),
         r"input_ids is not int64; convert it, as with .to\(torch.int64\)"),
        (lambda g: g.update(input_ids=OnDevice(np.ones((5, 2), np.int64).T)),
         "input_ids is not contiguous; give it with .contiguous"),
        (lambda g: g.update(input_ids=OnDevice(np.ones((2, 4), np.int64))),
         r"attention_mask has shape \(2, 5\), but input_ids has \(2, 4\)"),
        (lambda g: g.update(input_ids=OnDevice(np.ones((2, 5), np.int64), (2, 1))),
         "input_ids is on GPU 1, the model is on GPU 0"),
        (lambda g: g.update(input_ids=np.ones((2, 5), np.int64)),
         "input_ids is not on the GPU, but another input is"),
        (lambda g: g.pop("input_ids"), "the input input_ids is missing"),
        (lambda g: g.update(stream=-3), "stream is -3; give an integer"),
        (lambda g: [g.update({k: OnDevice(np.ones((1, 65), np.int64))}) for k in NAMES],
         "the input has 65 tokens, the model takes at most 64"),
        (lambda g: [g.update({k: OnDevice(np.ones((1, 5, 1), np.int64))}) for k in NAMES],
         r"input_ids has shape \(1, 5, 1\); give \(batch, length\)"),
    ],
)  # fmt: skip
def test_wrong_arrays_on_the_device_are_refused(model, change, message):
    _, tensors = device_request(2, 5)
    change(tensors)
    with pytest.raises(InputError, match=message):
        model(**tensors)


def test_results_refuse_to_be_copied(model):
    result = model(**device_request(1, 2)[1])["pooled"]
    assert result.__cuda_array_interface__["data"] == (result.pointer, False)
    assert result.__cuda_array_interface__["shape"] == (1, 8)
    for options in ({"copy": True}, {"dl_device": (1, 0)}):
        with pytest.raises(BufferError, match="given as it is"):
            result.__dlpack__(**options)


# -- refusals of a load ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "image"),
    [((9, 0), "cubin"), ((8, 0), PTX), ((8, 6), PTX), ((10, 0), PTX), ((12, 0), PTX)],
)
def test_load_takes_cubin_for_its_card_and_else_ptx(install, directory, capability, image):
    driver = install(lazy_driver.Driver(KERNELS, capability))
    loader.load(directory).close()
    assert driver.images == [image.encode()]


@pytest.mark.parametrize("feature, capability", [("sm_86", (8, 9)), ("sm_80", (8, 6))])
def test_load_takes_the_cubin_of_an_older_minor_version(install, tmp_path, feature, capability):
    manifest = {**MANIFEST, "target": {"name": "x", "arch": "cuda", "features": [feature]}}
    driver = install(lazy_driver.Driver(KERNELS, capability))
    loader.load(write(tmp_path / "older", manifest=manifest)).close()
    assert driver.images == [b"cubin"]


@pytest.mark.parametrize("ptx", [None, PTX, PTX.replace("sm_80", "sm_90a"), "no target"])
def test_load_names_the_card_that_is_too_old(install, tmp_path, ptx):
    install(lazy_driver.Driver(KERNELS, (7, 5)))
    message = (
        "the bundle is for GPUs of compute capability 9.0, Lazy GPU has 7.5; "
        "compile the model with --target cuda-sm75"
    )
    with pytest.raises(PlatformError, match=message):
        loader.load(write(tmp_path / "newer", ptx=ptx))


def test_ptx_for_one_card_only_is_not_for_newer_ones(install, tmp_path):
    install(lazy_driver.Driver(KERNELS, (10, 0)))
    with pytest.raises(PlatformError, match=r"capability 9.0, Lazy GPU has 10.0"):
        loader.load(write(tmp_path / "exact", ptx=PTX.replace("sm_80", "sm_90a")))


@pytest.mark.parametrize("code, name", [(218, "INVALID_PTX"), (222, "UNSUPPORTED_PTX_VERSION")])
def test_load_names_a_driver_that_cannot_take_the_code(install, directory, code, name):
    driver = install(lazy_driver.Driver(KERNELS, (10, 0), version=12020))
    driver.fail["cuModuleLoadDataEx"] = code
    message = (
        f"the driver of Lazy GPU, for CUDA 12.2, cannot take kernels.ptx: .*CUDA_ERROR_{name}.*; "
        "update the driver, or compile the model with an older CUDA compiler"
    )
    with pytest.raises(PlatformError, match=message):
        loader.load(directory)


def test_load_names_a_machine_without_a_gpu(install, directory):
    driver = install(lazy_driver.Driver(KERNELS))
    driver.fail["cuInit"] = 100
    with pytest.raises(PlatformError, match="sees no GPU; look at nvidia-smi and CUDA_VISIBLE"):
        loader.load(directory)
    driver.fail["cuInit"] = 999
    with pytest.raises(PlatformError, match="does not start: CUDA_ERROR_UNKNOWN"):
        loader.load(directory)


@pytest.mark.parametrize("device", [1, -1, "0", True])
def test_load_refuses_a_device_that_is_not_there(driver, directory, device):
    with pytest.raises(InputError, match=f"device is {device!r}; this machine has GPU 0"):
        loader.load(directory, device=device)


@pytest.mark.parametrize("streams", [0, None, "2"])
def test_load_refuses_streams_that_are_no_count(driver, directory, streams):
    with pytest.raises(InputError, match=r"streams is .*; give a whole number from 1"):
        cuda_loader.load(directory, streams=streams)


def test_load_names_a_missing_and_an_old_driver():
    with pytest.raises(PlatformError, match=r"cannot be loaded: .*absent.so.*; this bundle needs"):
        cuda_loader.open_driver("absent.so")
    with pytest.raises(PlatformError, match=r"too old: it has no cuInit; update it to 470"):
        cuda_loader.open_driver("libm.so.6")


def test_a_gpu_that_was_never_opened_ends_in_silence(monkeypatch):
    said = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    with pytest.raises(AttributeError):
        cuda_loader.Gpu(object())
    gc.collect()
    assert not said


def test_memory_that_does_not_suffice_is_named(install, directory):
    driver = install(lazy_driver.Driver(KERNELS, memory=1024))
    wanted = "Lazy GPU has too little memory: the weights need 1 MiB, 1 of 1 MiB are free; take"
    with pytest.raises(BertileError, match=wanted):
        loader.load(directory)
    driver.memory = 4 << 20
    with loader.load(directory) as model:
        with pytest.raises(BertileError, match="the activations need 8 MiB, 4 of 4 MiB are free"):
            model(input_ids=np.ones((1000, 64), int))
        same(model(**request(2, 5)), expected(**request(2, 5)))


def test_memory_that_other_requests_have_left_is_taken_back(install, directory):
    driver = install(lazy_driver.Driver(KERNELS, memory=10 << 20))
    half, whole = ({"input_ids": np.ones((batch, 64), int)} for batch in (500, 990))
    with loader.load(directory) as model:
        same(model(**half), expected(**half))
        with model._workspace(None, ()):  # as a request that runs at the same time
            same(model(**half), expected(**half))
        assert driver.held()["stream"] == 2 and driver.held()["device"] > 8 << 20
        same(model(**whole), expected(**whole))
        assert driver.held()["stream"] == 1


def changed(change):
    plan = json.loads(json.dumps(PLAN))
    change(plan)
    return plan


def seen_by(plan, manifest=MANIFEST):
    """The plan with what a compile for the manifest writes into it."""
    weights = [(name, "F32", array.shape) for name, array in PARAMS.items()]
    return {**plan, "interface": interface(manifest, weights)}


def test_every_changed_number_of_a_manifest_is_seen(driver, tmp_path):
    """By its hash; and where that was written anew, by the plan, which says the same."""
    directory = write(tmp_path / "whole", seen_by(PLAN))
    loader.load(directory).close()
    manifest = json.loads((directory / "manifest.json").read_text())
    for place in changed_bundles.numbers(manifest):
        number = changed_bundles.at(manifest, place)
        for new in {0, -1, number - 1, number + 1, 1 << 31, 1 << 61, 1 << 64}:
            other = changed_bundles.changed(manifest, place, new)
            for sealed in (False, True):
                changed_bundles.write_manifest(directory, other, sealed)
                with pytest.raises(BundleError) as caught:
                    loader.load(directory)
                said = "has changed since it was compiled"
                assert sealed or said in str(caught.value) or place == ("schema",)
                del caught  # its frames hold the device
    gc.collect()
    assert driver.held() == {} and driver.retained == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["inputs"][0].update(below=49),
        lambda m: m["inputs"][0].update(below=None),
        lambda m: m["inputs"][1].update(default="zeros"),
        lambda m: m["static"].update(padded=True),
        lambda m: m["model"].update(max_length=None),
    ],
)
def test_what_else_a_manifest_says_is_compared_with_the_plan(driver, tmp_path, change):
    directory = write(tmp_path / "whole", seen_by(PLAN))
    manifest = json.loads((directory / "manifest.json").read_text())
    change(manifest)
    changed_bundles.write_manifest(directory, manifest)
    with pytest.raises(BundleError, match=r"cannot load .*plan\.json: it was compiled for '"):
        loader.load(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.update(schema=2), "is damaged: it has schema 2, this loader reads 1; compile"),
        (lambda p: p.pop("steps"), "is damaged: 'steps' is missing"),
        (lambda p: p.update(steps=[]), "is damaged: it has no steps"),
        (lambda p: p["inputs"][0].update(name="ids"), "inputs are not those of the manifest: ids"),
        (lambda p: p["inputs"][0].update(dtype="int32"), "input_ids is not as the manifest says"),
        (lambda p: p["outputs"][1].update(shape=["batch", 9]), "pooled is not as the manifest"),
        (lambda p: p["weights"].reverse(), "the plan's weights are not those of the manifest"),
        (lambda p: p.update(interface=1), "its interface is no text"),
        (lambda p: p["outputs"].pop(), "its outputs are not those of the manifest: hidden"),
        (lambda p: p["outputs"][0].update(buffer=4), "two outputs share a buffer, or have none"),
        (lambda p: p["outputs"][0].update(buffer=40), "two outputs share a buffer, or have none"),
        (lambda p: p["weights"].append("absent"), "is damaged: it lacks 'absent'"),
        (lambda p: p["steps"][2]["arguments"].append(["weight", 3]), "weight 3, which does not"),
        (lambda p: p["steps"][2]["arguments"].append(["buffer", -1]), "buffer -1, which does not"),
        (lambda p: p["steps"][2]["arguments"].append(["int8", 1]), "an argument of the kind int8"),
        (lambda p: p["steps"][2]["arguments"].append(["float32", "x"]), "is damaged"),
        (lambda p: p["steps"][2].update(threads=2048), "scaled has 2048 threads"),
        (lambda p: p["steps"][2].update(grid=[1, 1]), "scaled has 128 threads, 100000 bytes"),
        (lambda p: p["steps"][2].update(entry="absent"), "the kernels lack 'absent'"),
        (lambda p: p["steps"][2].update(grid=["rows", 1, 1]), "the extent 'rows', no arithmetic"),
        (lambda p: p["buffers"][0].update(bytes="open('x')"), "no arithmetic over batch, length"),
        (lambda p: p["buffers"].append(3), "is damaged"),
    ],
)
def test_load_refuses_a_broken_plan(driver, tmp_path, change, message):
    with pytest.raises(BundleError, match=message):
        loader.load(write(tmp_path / "broken", changed(change)))
    gc.collect()
    assert driver.held() == {} and driver.retained == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p["steps"][2].update(grid=["length-7", 1, 1]), r"scaled on a grid of \[0, 1"),
        (lambda p: p["buffers"][0].update(bytes="0-8"), "a buffer of negative size"),
        (lambda p: p["buffers"][3].update(bytes=10**6), "buffer 3 is larger than its output"),
        (lambda p: p["buffers"][0].update(bytes="64//(length-7)"), "the plan divides by zero"),
        (lambda p: p["outputs"][1].update(shape=["length-7", 8]), r"of shape \(0, 8\)"),
        (lambda p: p["steps"][2]["arguments"].__setitem__(3, ["int32", "length*10000000000"]),
         "gives 70000000000 as int32"),
    ],
)  # fmt: skip
def test_a_call_names_what_is_broken_in_the_plan(driver, tmp_path, change, message):
    with loader.load(write(tmp_path / "broken", changed(change))) as model:
        for _ in range(2):
            with pytest.raises(BundleError, match=message):
                model(**request(1, 7))
    assert driver.held() == {}


@pytest.mark.parametrize("name", ["plan.json", "kernels.cubin", "params.safetensors"])
def test_load_names_a_missing_and_a_changed_file(driver, directory, tmp_path, name):
    copy = Path(shutil.copytree(directory, tmp_path / "copy"))
    data = bytearray((copy / name).read_bytes())
    data[-1] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(BundleError, match=f"{name} has changed since it was compiled"):
        loader.load(copy)
    (copy / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        loader.load(copy)


# -- extents, arena, order ---------------------------------------------------------------------

SYMBOLS = {"batch": 3, "length": 17, "blocks": 6, "rows": 96}


@pytest.mark.parametrize(
    ("extent", "value"),
    [
        (7, 7), ("7", 7), ("batch", 3), ("(length+15)//16*batch", 6), ("rows*8-blocks", 762),
        ("length < 18", 1), ("length >= 18", 0), ("(length >= 17)*4+(batch<3)*2", 4),
        ("-batch", -3),
    ],
)  # fmt: skip
def test_evaluate_is_arithmetic(extent, value):
    result = cuda_loader.evaluate(extent, SYMBOLS)
    assert result == value and type(result) is int


@pytest.mark.parametrize(
    "extent",
    ["", "x", "1.5", "1/2", "2**60", "batch % 2", "batch > 1", "batch == 3", "(batch", "1)+(1",
     "batch, 2", "[batch]", "batch if length else 2", "lambda: 1", "__import__('os')", "batch.real",
     "open('x')", "True", "'a'", "f'{batch}'", " batch", "batch:=2", "(" * 400 + ")" * 400,
     "1" * 30, "+".join("1" * 600), "batch\0", True, 1.0, None, ["batch"], b"batch"],
)  # fmt: skip
def test_evaluate_refuses_what_is_no_arithmetic(extent):
    with pytest.raises(BundleError, match="no arithmetic over batch, length, blocks, rows"):
        cuda_loader.evaluate(extent, SYMBOLS)


def test_evaluate_names_a_division_by_zero():
    with pytest.raises(BundleError, match=r"'1//\(batch-3\)' divides by zero"):
        cuda_loader.evaluate("1//(batch-3)", SYMBOLS)


@pytest.mark.parametrize("seed", range(40))
def test_the_arena_never_holds_two_live_buffers_in_one_place(seed):
    rng = np.random.default_rng(seed)
    count, steps = int(rng.integers(1, 60)), int(rng.integers(1, 40))
    sizes = [int(size) for size in rng.choice([0, 1, 100, 256, 3000, 100_000], count)]
    lives = [tuple(sorted(map(int, rng.integers(0, steps, 2)))) for _ in range(count)]
    offsets, end = cuda_loader.place_buffers(sizes, lives)
    for buffer in range(count):
        assert (
            offsets[buffer] % 256 == 0
            and offsets[buffer] >= 0
            and offsets[buffer] + sizes[buffer] <= end
        )
        for other in range(buffer):
            at_once = lives[buffer][0] <= lives[other][1] and lives[other][0] <= lives[buffer][1]
            apart = (
                offsets[buffer] + sizes[buffer] <= offsets[other]
                or offsets[other] + sizes[other] <= offsets[buffer]
            )
            assert apart or not at_once
    # no worse than each for itself, no better than what one step needs
    need = [-(-max(1, size) // 256) * 256 for size in sizes]
    most = max(
        sum(n for n, (first, last) in zip(need, lives) if first <= step <= last)
        for step in range(steps)
    )
    assert most <= end <= sum(need)


def test_requests_of_unequal_lengths_share_places_where_everything_fits():
    plan = cuda_loader.Plan(PLAN, MANIFEST)
    whole, parts = plan.layout(4, 32, 8), [plan.layout(4, 32, blocks) for blocks in (4, 5, 7)]
    assert all(part.buffers == whole.buffers and part.after == whole.after for part in parts)
    assert [part.inputs[-1].shape for part in parts] == [(4, 4), (5, 4), (7, 4)]
    # a buffer that grows as there are fewer blocks, as partial sums of few rows do
    size = "100000 - blocks*10000"
    plan = cuda_loader.Plan(changed(lambda p: p["buffers"][0].update(bytes=size)), MANIFEST)
    whole, part = plan.layout(4, 32, 8), plan.layout(4, 32, 4)
    assert part.bytes - whole.bytes > 30_000
    spans = sorted((part.buffers[buffer], part.sizes[buffer]) for buffer in (0, 1, 2))
    assert all(begin + size <= after for (begin, size), (after, _) in itertools.pairwise(spans))


def test_the_arena_of_a_chain_holds_two_buffers():
    sizes = [4096] * 20
    offsets, end = cuda_loader.place_buffers(sizes, [(step, step + 1) for step in range(20)])
    assert end == 2 * 4096 and set(offsets) == {0, 4096}


@pytest.mark.parametrize("seed", range(40))
def test_steps_that_touch_the_same_bytes_are_ordered(seed):
    rng = np.random.default_rng(seed)
    count, steps = int(rng.integers(1, 30)), int(rng.integers(1, 30))
    begins = rng.integers(0, 1000, count)
    spans = {buffer: (int(b), int(b + rng.integers(1, 100))) for buffer, b in enumerate(begins)}
    uses = [list(map(int, rng.integers(0, count, rng.integers(0, 4)))) for _ in range(steps)]
    after = cuda_loader.order(uses, spans)
    reach = []
    for step, waits in enumerate(after):
        reach.append(set(waits).union(*(reach[earlier] for earlier in waits)))
        wanted = {
            earlier
            for earlier in range(step)
            if any(spans[a][0] < spans[b][1] and spans[b][0] < spans[a][1]
                   for a in uses[earlier] for b in uses[step])
        }  # fmt: skip
        assert wanted <= reach[step] and set(waits) <= wanted
        assert not any(
            earlier in reach[later] for earlier in waits for later in waits
        )  # none is implied


def test_independent_steps_may_run_at_once():
    spans = {0: (0, 8), 1: (8, 16), 2: (16, 24)}
    assert cuda_loader.order([[0], [1], [0, 1, 2]], spans) == [[], [], [1, 0]]


# -- by itself ---------------------------------------------------------------------------------


def run(*arguments, python=sys.executable, **options):
    return subprocess.run(
        [python, *arguments], capture_output=True, text=True, timeout=60, **options
    )


def test_command_line_prints_what_a_bundle_gives_on_the_gpu(driver, directory, capsys):
    assert loader.main([str(directory), "--ids", "1,2,3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    first = ", ".join(f"{value:.4f}" for value in expected([[1, 2, 3]])["pooled"][0, :4])
    assert lines[1] == "target   cuda-sm90 (cuda sm_90)"
    assert lines[2].startswith("loaded   in ") and lines[2].endswith(" ms, Lazy GPU")
    assert f"output   pooled (1, 8): {first}, …" in lines
    assert lines[-1] == "on GPU   in 0.500 ms, with copies in 0.500 ms (medians of 100)"


def test_command_line_in_the_bundle_says_what_is_missing(directory, tmp_path):
    copy = Path(shutil.copytree(directory, tmp_path / "copy"))
    done = run("-I", "loader.py", cwd=copy, env={**os.environ, "LD_LIBRARY_PATH": ""})
    if done.returncode == 0:  # a machine with a driver, and these kernels are none
        pytest.fail(done.stdout)
    assert done.returncode in (1, 3) and done.stderr.startswith("loader.py: the NVIDIA driver")
    (copy / "cuda_loader.py").unlink()
    done = run("loader.py", cwd=copy)
    assert done.returncode == 3 and done.stderr == (
        f"loader.py: the bundle is for a GPU, and {copy}/cuda_loader.py is missing; "
        "copy it beside loader.py\n"
    )


def test_both_files_of_a_bundle_share_their_errors(directory):
    code = (
        "import cuda_loader, loader\n"
        "assert cuda_loader.BertileError is loader.BertileError\n"
        "assert loader._cuda_loader() is cuda_loader\n"
        "try:\n    loader.load('.')\n"
        "except loader.PlatformError as error:\n    print(error)\n"
    )
    done = run("-c", code, cwd=directory)
    assert done.stdout.startswith("the NVIDIA driver's library cannot be loaded"), done.stderr


def test_a_bundle_for_a_cpu_is_refused_by_name(driver, tmp_path):
    target = {"name": "avx512", "arch": "x86_64", "features": []}
    files = {name: {"bytes": 0, "sha256": ""} for name in ("lib.so", "params.safetensors")}
    manifest = {**MANIFEST, "target": target, "schema": 1, "params": [], "files": files}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(PlatformError, match="is for x86_64, not for a GPU; load it with bertile"):
        cuda_loader.load(tmp_path)


def test_loader_needs_numpy_and_the_standard_library_of_python_3_9():
    tree = ast.parse(one_file.cuda_loader(), feature_version=(3, 9))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"numpy", "loader"}


def test_import_brings_nothing_but_numpy_and_takes_little_time():
    code = (
        "import time, numpy\n"
        "began = time.perf_counter()\n"
        "import bertile.cuda_loader, sys\n"
        "spent = time.perf_counter() - began\n"
        "tops = {name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names)\n"
        "print(sorted(top for top in tops if not top.startswith('_')), spent)\n"
        "print({name.split('.')[1] for name in sys.modules if name.startswith('bertile.')})\n"
    )
    first, second = run("-c", code).stdout.splitlines()
    packages, spent = first.rsplit(" ", 1)
    assert set(ast.literal_eval(packages)) <= {
        "bertile",
        "numpy",
        "sitecustomize",
        "cython_runtime",
    }
    assert ast.literal_eval(second) == {"cuda_loader", "loading"}
    assert float(spent) < 0.5  # some 30 ms; a machine under load takes longer


# -- kernels in CUDA, on the emulator's driver -------------------------------------------------

SOURCE = """
extern "C" __global__ void __launch_bounds__(128) embed(
    const long long* ids, const long long* types, const int* table, const float* words,
    const float* kinds, float* out, int batch, int length, int blocks) {
  const int* place = table + 4 * blockIdx.x;
  const int token = threadIdx.x / 8, channel = threadIdx.x % 8;
  const int position = place[1] + token < length ? place[1] + token : length - 1;
  const int at = place[0] * length + position;
  out[blockIdx.x * 128 + threadIdx.x] =
      words[ids[at] * 8 + channel] + kinds[types[at] * 8 + channel];
}
extern "C" __global__ void __launch_bounds__(32) keys(
    const long long* mask, const int* table, float* out, int batch, int length, int blocks) {
  const int* place = table + 4 * blockIdx.x;
  const int position = place[1] + threadIdx.x;
  if (threadIdx.x < 16)
    out[blockIdx.x * 16 + threadIdx.x] = position < length && mask[place[0] * length + position];
}
extern "C" __global__ void __launch_bounds__(128) scaled(
    const float* x, const float* scale, float* out, int rows, float by) {
  const int at = blockIdx.x * 128 + threadIdx.x;
  out[at] = x[at] * scale[at % 8] * by;
}
extern "C" __global__ void __launch_bounds__(128) hidden(
    const float* x, const int* table, float* out, int batch, int length, int blocks) {
  int found = -1;
  for (int i = 0; i < blocks; ++i)
    if (table[4 * i] == blockIdx.x && table[4 * i + 1] == blockIdx.y * 16) found = i;
  const int position = blockIdx.y * 16 + threadIdx.x / 8, channel = threadIdx.x % 8;
  if (position < length)
    out[(blockIdx.x * length + position) * 8 + channel] =
        found < 0 ? 0.0f : x[found * 128 + threadIdx.x];
}
extern "C" __global__ void __launch_bounds__(32) pooled(
    const float* x, const float* used, const int* table, float* out, int batch, int length,
    int blocks) {
  float sum = 0;
  if (threadIdx.x < 8) {
    for (int i = 0; i < 16 * blocks; ++i)
      if (table[4 * (i / 16)] == blockIdx.x) sum += used[i] * x[i * 8 + threadIdx.x];
    out[blockIdx.x * 8 + threadIdx.x] = sum;
  }
}
"""
ENTRIES = PTX + "".join(f".visible .entry {entry}() {{ ret; }}\n" for entry in KERNELS)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """(bundle, directory with a libcuda.so.1, kernels) of a machine with an emulated GPU."""
    from bertile.run.cuda import emulator

    reason = emulator.missing()
    if reason:
        pytest.skip(reason)
    directory = tmp_path_factory.mktemp("emulated")
    build_driver(directory).rename(directory / "libcuda.so.1")
    older = {"target": {"name": "cuda-sm80", "arch": "cuda", "features": ["sm_80"]}}
    bundled = write(directory / "bundle", manifest={**MANIFEST, **older}, ptx=ENTRIES)
    return bundled, directory, emulator.build(SOURCE, directory)


@pytest.mark.parametrize("lazy", [0, 1])
def test_emulated_kernels_give_the_same_numbers(emulated, monkeypatch, lazy):
    bundled, directory, kernels = emulated
    monkeypatch.setenv("BERTILE_EMULATED_KERNELS", str(kernels))
    path = directory / "libcuda.so.1"
    fake = ctypes.CDLL(str(path))
    fake.fake_lazy(lazy)
    with cuda_loader.load(bundled, driver=str(path)) as model:
        for number, shape in enumerate([(1, 1), (3, 17), (2, 64), (3, 17)]):
            inputs = request(*shape, number)
            same(model(**inputs), expected(**inputs))
        launches = fake.fake_calls(b"cuGraphLaunch")
        model(**inputs)
        assert fake.fake_calls(b"cuGraphLaunch") == launches + 1
        assert fake.fake_calls(b"cuLaunchKernel") == 0
        assert model.time(repeats=3, **inputs).shape == (3,)
    for kind in (b"memory", b"host", b"stream", b"event", b"graph", b"executable", b"module"):
        assert fake.fake_live(kind) == 0, kind


def test_loader_runs_a_bundle_with_numpy_alone_on_a_gpu(emulated, bare):
    bundled, directory, kernels = emulated
    environment = {
        "LD_LIBRARY_PATH": str(directory),
        "BERTILE_EMULATED_KERNELS": str(kernels),
    }
    done = run("-I", "loader.py", "--ids", "1,2,3", cwd=bundled, env=environment, python=bare)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[2].endswith(" ms, emulated sm_90"), done.stderr
    first = ", ".join(f"{value:.4f}" for value in expected([[1, 2, 3]])["pooled"][0, :4])
    assert f"output   pooled (1, 8): {first}, …" in lines
    assert lines[-1].startswith("on GPU   in ")
    done = run("-I", "loader.py", "--device", "1", cwd=bundled, env=environment, python=bare)
    assert done.returncode == 2
    assert done.stderr == "loader.py: device is 1; this machine has GPU 0\n"
