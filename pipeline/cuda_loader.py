"""A bundle for an NVIDIA GPU comes in, a callable from token ids to arrays goes out.

On numpy, ctypes and the driver's own library (libcuda.so.1), with what `loader` has. It is
`bertile.cuda_loader`, and copied into a bundle it lies beside the `loader.py` that calls it.
"""

from __future__ import annotations

import ast
import bisect
import contextlib
import ctypes
import functools
import json
import math
import os
import re
import struct
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Union

import numpy as np

if __package__:
    from bertile import loader
    from bertile.loader import BertileError, BundleError, InputError, PlatformError
else:
    import loader
    from loader import BertileError, BundleError, InputError, PlatformError

PLAN, CUBIN, PTX = "plan.json", "kernels.cubin", "kernels.ptx"
SCHEMA = 1  # the newest schema of plan.json that this loader reads
DRIVER = "libcuda.so.1"
TOKENS = 16  # of a block: the form of activations on a GPU
# Of one pass through the model; a longer batch takes several. 65536 tokens fill every card, and
# twice as many would only double the memory that activations take.
PASS_BLOCKS = 4096
GRAPHS = 128  # that each workspace keeps, one for each shape of a request
STREAMS = 4  # requests at once; more wait for their turn
CACHED = 64  # results on the device that were given back and are kept for the next request
AGAIN = "compile the bundle again"

Extent = Union[int, str]

# -- public ------------------------------------------------------------------------------------


def load(
    directory: str | os.PathLike,
    device: int = 0,
    driver: str | None = None,
    *,
    verify: bool = True,
    streams: int = STREAMS,
) -> Model:
    """Load the bundle in `directory` onto the GPU of number `device`.

    `driver` is the path of the driver's library (default: libcuda.so.1), `streams` how many
    requests may run at once, each with memory of its own for activations. Raises BundleError for a
    damaged bundle, PlatformError for a machine that cannot run it.
    """
    root = Path(directory)
    manifest = loader.read_manifest(root)
    target = manifest["target"]
    if target["arch"] != loader.CUDA:
        raise PlatformError(
            f"the bundle is for {target['arch']}, not for a GPU", "load it with bertile.load"
        )
    weights = {loader.WEIGHTS: manifest["files"][loader.WEIGHTS]}
    others = {name: spec for name, spec in manifest["files"].items() if name not in weights}
    with ThreadPoolExecutor(1) as pool:  # the hash of the weights while the device gets ready
        checked = pool.submit(loader.check_files, root, weights, verify)
        gpu = Gpu(open_driver(driver), device)
        files = loader.check_files(root, others, verify)
        files.update(loader.check_files(root, weights, verify=False))
        model = Model(gpu, manifest, _read_plan(files[PLAN], manifest), streams)
        try:
            try:
                model._start(files)
            finally:  # changed weights explain more than what came of them
                checked.result()
        except BaseException:
            model.close()
            raise
    return model


class Model:
    """A bundle on a GPU. Any number of threads may call it; up to `streams` run at once.

    Each shape of a request is one CUDA graph, made when the shape is first seen.
    """

    def __init__(self, gpu: Gpu, manifest: dict, plan: Plan, streams: int = STREAMS):
        if type(streams) is not int or streams < 1:
            raise InputError(f"streams is {streams!r}", "give a whole number from 1")
        self.manifest, self.gpu = manifest, gpu
        self.inputs = tuple(spec["name"] for spec in manifest["inputs"])
        self.outputs = tuple(spec["name"] for spec in manifest["outputs"])
        self.max_length: int | None = manifest["model"]["max_length"]
        self._plan, self._streams = plan, streams
        self._code: _Code | None = None
        self._results = _Results(gpu)
        self._turn = threading.Condition()
        self._idle: list[_Workspace] = []
        self._made = self._busy = 0
        self._closed = False

    def _start(self, files: Mapping[str, Path]) -> None:
        with self.gpu:
            self._code = _Code(self.gpu, self.manifest, self._plan, files)

    def __call__(self, *, stream=None, **inputs) -> dict:
        """Run the model on arrays or nested lists of integers, each (batch, length).

        As for a model on a CPU, a missing attention_mask is all ones, missing token_type_ids are
        all zeros, and positions behind the last token of a sequence cost nothing and are zero in
        the outputs. Raises InputError for a wrong name, rank, type or shape, for ids that the model
        does not have and for too many tokens.

        Arrays that are on this GPU (torch, cupy: whatever exports DLPack) are read in place, and
        the outputs are DeviceArrays, without a copy and without waiting: all of it is put on
        `stream` (an integer, or an object of torch or cupy; default: the legacy default stream).
        What such ids hold is not looked at: they must be below the model's limits, the mask is
        applied, and positions behind the last token are computed like all others.
        """
        if any(_on_device(value) for value in inputs.values()):
            return self._call_on_device(inputs, _stream_handle(stream))
        request = self._request(inputs)
        pieces = [
            self._run(request, first, count, None if stream is None else _stream_handle(stream))
            for first, count in request.passes
        ]
        return {
            spec["name"]: loader.cut(
                spec["axes"], [piece[index] for piece in pieces], request.length, request.ends
            )
            for index, spec in enumerate(self.manifest["outputs"])
        }

    def time(
        self, *, repeats: int = 100, warm: int = 10, copies: bool = False, **inputs
    ) -> np.ndarray:
        """Return how many milliseconds each of `repeats` runs on `inputs` takes on the GPU.

        Measured by an event before and one behind each launch of the graph, without waiting in
        between, after `warm` runs; with `copies` the graph also brings the inputs up and the
        outputs down. The inputs are arrays as for a call, of at most one pass.
        """
        request = self._request(inputs)
        if len(request.passes) > 1:
            raise InputError("the batch takes several passes", "time a smaller one")
        if type(repeats) is not int or repeats < 1 or type(warm) is not int or warm < 0:
            raise InputError("repeats or warm is no count", "give repeats from 1 and warm from 0")
        room, table = request.room(0, len(request.ends))
        with self._workspace(None, key := ("full" if copies else "bare", *room, len(table))) as at:
            graph = self._graph(at, key)
            request.fill(graph.up, 0, len(request.ends), table)
            if not copies:
                at.bring_up(graph.layout)
            return at.time(graph, repeats, warm)

    def close(self) -> None:
        """Give back weights, kernels and workspaces, once the calls under way have ended.

        A later call raises BertileError. DeviceArrays stay valid.
        """
        with self._turn:
            self._closed = True
            self._turn.notify_all()
            self._turn.wait_for(lambda: not self._busy)
            idle, self._idle = self._idle, []
            code, self._code = self._code, None
        for workspace in idle:
            workspace.close()
        self._results.close()
        if code is not None:
            code.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def __del__(self):
        if getattr(self, "_turn", None) is not None and not sys.is_finalizing():
            self.close()

    def _request(self, inputs: dict) -> _Request:
        return _Request(inputs, self.manifest, self.max_length)

    def _run(self, request: _Request, first: int, count: int, stream: int | None) -> list:
        room, table = request.room(first, count)
        key = ("full", *room, len(table))
        with self._workspace(stream, key) as at:
            graph = self._graph(at, key)
            request.fill(graph.up, first, count, table)
            at.launch(graph, at.stream if stream is None else stream)
            at.wait()
            return [np.array(view) for view in graph.down]

    def _call_on_device(self, inputs: dict, stream: int) -> dict:
        specs, static = self.manifest["inputs"], self.manifest["static"]
        given = _borrow_all(inputs, specs, self.gpu, stream)
        names = tuple(spec["name"] for spec in specs if spec["name"] in given)
        batch, length = given[names[0]].shape
        wanted = (static.get("batch") or batch, static.get("length") or length)
        if (batch, length) != wanted:
            raise InputError(f"the input is {(batch, length)}, this bundle takes exactly {wanted}")
        if self.max_length is not None and length > self.max_length:
            raise _too_long(length, self.max_length)
        blocks = batch * -(-length // TOKENS)
        key = ("device", batch, length, blocks, names)
        with self._workspace(stream, key) as at:
            graph = self._graph(at, key)
            outputs = [self._results.take(array, stream) for array in graph.layout.outputs]
            graph.point(
                [given[name].pointer if name in given else None for name in self.inputs],
                [output.pointer for output in outputs],
            )
            at.launch(graph, stream)
        return dict(zip(self.outputs, outputs))

    def _graph(self, workspace: _Workspace, key: tuple) -> _Graph:
        """The workspace's graph; where memory is short, after the others gave theirs back."""
        try:
            return workspace.graph(key)
        except OutOfMemory:
            with self._turn:
                idle, self._idle = self._idle, []
                self._made -= len(idle)
            for one in idle:
                one.close()
            self._results.clear()
            return workspace.graph(key)

    @contextlib.contextmanager
    def _workspace(self, stream: int | None, key: tuple):
        """Lend a workspace: one where nothing runs on another stream, and that has the graph."""
        with self._turn:
            self.gpu.check()
            self._turn.wait_for(lambda: self._closed or self._idle or self._made < self._streams)
            if self._closed:
                raise BertileError("the model is closed", "load the bundle again")
            self._busy += 1
            order = [(one.is_free(stream), key in one.graphs) for one in self._idle]
            best = max(range(len(order)), key=order.__getitem__, default=None)
            workspace = None
            if self._made < self._streams and (best is None or not order[best][0]):
                self._made += 1
            else:
                workspace = self._idle.pop(best)
        try:
            with self.gpu:
                if workspace is None:
                    workspace = _Workspace(self.gpu, self._plan, self._code, self.manifest)
                yield workspace
        finally:
            with self._turn:
                self._busy -= 1
                if workspace is None:
                    self._made -= 1
                else:
                    self._idle.append(workspace)
                self._turn.notify_all()


def _too_long(length: int, limit: int) -> InputError:
    return InputError(
        f"the input has {length} tokens, the model takes at most {limit}",
        "shorten or split the text",
    )


class _Request:
    """Checked arrays of one call, and the passes that they take."""

    def __init__(self, inputs: dict, manifest: dict, max_length: int | None):
        self._specs, static = manifest["inputs"], manifest["static"]
        given = loader.check_inputs(inputs, self._specs, max_length)
        batch, self.length = next(iter(given.values())).shape
        self._step, self._width = static.get("batch"), static.get("length") or self.length
        mask = given.get("attention_mask")
        exact = "attention_mask" not in (spec["name"] for spec in self._specs)
        if self.length > self._width or (self.length < self._width and exact):
            at_most = "at most" if self.length > self._width else "exactly"
            raise InputError(
                f"the input has {self.length} tokens, this bundle takes {at_most} {self._width}"
            )
        self.ends = np.full(batch, self.length) if mask is None else loader.sequence_ends(mask)
        self._values = [
            given.get(spec["name"], loader.FILL.get(spec["default"])) for spec in self._specs
        ]
        self.passes = loader.passes(self.ends, TOKENS, PASS_BLOCKS, self._step)

    def room(self, first: int, count: int) -> tuple[tuple[int, int], np.ndarray]:
        """The (batch, length) of a pass, and its table of blocks."""
        ends = np.ones(self._step or count, np.int64)
        ends[:count] = self.ends[first : first + count]
        return (len(ends), self._width), loader.blocks_of(ends, TOKENS)

    def fill(self, views: list[np.ndarray], first: int, count: int, table: np.ndarray) -> None:
        """Write a pass into the staging memory: what the rows lack is 0."""
        for view, value in zip(views, self._values):
            if not isinstance(value, int):
                value = value[first : first + count]
            if view.shape != (count, self.length):
                view.fill(0)
            view[:count, : self.length] = value
        views[-1][...] = table


# -- extents -----------------------------------------------------------------------------------

_ALLOWED = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.Compare, ast.Name, ast.Load, ast.Constant,
    ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.USub, ast.Lt, ast.GtE,
)  # fmt: skip
_LONGEST = 1000  # characters of an extent; deeper nesting than that holds would end the parser


def evaluate(extent: Extent, symbols: Mapping[str, int]) -> int:
    """Return the value of an extent: an integer, or text over the names of `symbols`.

    Text may hold + - * // and parentheses, and < and >=, which give 1 or 0. Raises BundleError
    for anything else.
    """
    if type(extent) is int:
        return extent
    if not isinstance(extent, str):
        raise _no_extent(extent, symbols)
    try:
        return int(_compiled((extent,), tuple(symbols))(*symbols.values())[0])
    except ZeroDivisionError as error:
        raise BundleError(f"'{extent}' divides by zero", "compile the bundle again") from error


@functools.lru_cache(maxsize=4096)
def _compiled(extents: tuple[Extent, ...], names: tuple[str, ...]):
    """A function of the symbols that gives the values of all extents at once."""
    for extent in extents:
        _check_extent(extent, names)
    text = "".join(f"({extent}), " for extent in extents)
    return eval(f"lambda {', '.join(names)}: ({text})", {"__builtins__": {}})


def _check_extent(extent: Extent, names: tuple[str, ...]) -> None:
    """Only what `_ALLOWED` lists is ever compiled: a bundle's plan must not run code of its own."""
    if type(extent) is int:
        return
    if not isinstance(extent, str) or len(extent) > _LONGEST:
        raise _no_extent(extent, names)
    try:
        tree = ast.parse(extent, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _no_extent(extent, names) from error
    for node in ast.walk(tree):
        known = isinstance(node, _ALLOWED)
        if isinstance(node, ast.Constant):
            known = type(node.value) is int and node.value < 1 << 62
        elif isinstance(node, ast.Name):
            known = node.id in names
        if not known:
            raise _no_extent(extent, names)


def _no_extent(extent: object, names: Iterable[str]) -> BundleError:
    return BundleError(
        f"the plan has the extent {str(extent)[:80]!r}, no arithmetic over {', '.join(names)}",
        "compile the bundle again",
    )


# -- the driver --------------------------------------------------------------------------------

_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
_UNSIGNED, _ADDRESS, _LONG = ctypes.c_uint, ctypes.c_uint64, ctypes.c_ulonglong


class KernelNode(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v1."""

    _fields_ = (
        ("function", _POINTER),
        ("grid", _UNSIGNED * 3),
        ("block", _UNSIGNED * 3),
        ("shared", _UNSIGNED),
        ("arguments", _POINTER),  # void**
        ("extra", _POINTER),
    )


class MemcpyNode(ctypes.Structure):
    """CUDA_MEMCPY3D_v2, of which a copy of bytes in one row uses a part."""

    _fields_ = (
        ("source_place", _SIZE * 4),  # x in bytes, y, z, level
        ("source_kind", _INT),  # 1 host, 2 device
        ("source_host", _POINTER),
        ("source_device", _ADDRESS),
        ("source_rest", _SIZE * 4),  # array, reserved, pitch, height
        ("target_place", _SIZE * 4),
        ("target_kind", _INT),
        ("target_host", _POINTER),
        ("target_device", _ADDRESS),
        ("target_rest", _SIZE * 4),
        ("bytes", _SIZE),
        ("height", _SIZE),
        ("depth", _SIZE),
    )


# Every function of the driver that is called, with the types of its parameters: pointers to what
# is written and handles are _POINTER, addresses on the device _ADDRESS.
FUNCTIONS = {
    "cuInit": (_UNSIGNED,),
    "cuDriverGetVersion": (_POINTER,),
    "cuGetErrorName": (_INT, _POINTER),
    "cuGetErrorString": (_INT, _POINTER),
    "cuDeviceGetCount": (_POINTER,),
    "cuDeviceGet": (_POINTER, _INT),
    "cuDeviceGetName": (_POINTER, _INT, _INT),
    "cuDeviceGetAttribute": (_POINTER, _INT, _INT),
    "cuDevicePrimaryCtxRetain": (_POINTER, _INT),
    "cuDevicePrimaryCtxRelease_v2": (_INT,),
    "cuCtxPushCurrent_v2": (_POINTER,),
    "cuCtxPopCurrent_v2": (_POINTER,),
    "cuMemGetInfo_v2": (_POINTER, _POINTER),
    "cuMemAlloc_v2": (_POINTER, _SIZE),
    "cuMemFree_v2": (_ADDRESS,),
    "cuMemHostAlloc": (_POINTER, _SIZE, _UNSIGNED),
    "cuMemFreeHost": (_POINTER,),
    "cuMemcpyHtoDAsync_v2": (_ADDRESS, _POINTER, _SIZE, _POINTER),
    "cuModuleLoadDataEx": (_POINTER, _POINTER, _UNSIGNED, _POINTER, _POINTER),
    "cuModuleUnload": (_POINTER,),
    "cuModuleGetFunction": (_POINTER, _POINTER, ctypes.c_char_p),
    "cuFuncSetAttribute": (_POINTER, _INT, _INT),
    "cuStreamCreate": (_POINTER, _UNSIGNED),
    "cuStreamDestroy_v2": (_POINTER,),
    "cuStreamSynchronize": (_POINTER,),
    "cuStreamWaitEvent": (_POINTER, _POINTER, _UNSIGNED),
    "cuEventCreate": (_POINTER, _UNSIGNED),
    "cuEventDestroy_v2": (_POINTER,),
    "cuEventRecord": (_POINTER, _POINTER),
    "cuEventSynchronize": (_POINTER,),
    "cuEventElapsedTime": (_POINTER, _POINTER, _POINTER),
    "cuGraphCreate": (_POINTER, _UNSIGNED),
    "cuGraphDestroy": (_POINTER,),
    "cuGraphAddKernelNode": (_POINTER, _POINTER, _POINTER, _SIZE, _POINTER),
    "cuGraphAddMemcpyNode": (_POINTER, _POINTER, _POINTER, _SIZE, _POINTER, _POINTER),
    "cuGraphInstantiateWithFlags": (_POINTER, _POINTER, _LONG),
    "cuGraphExecKernelNodeSetParams": (_POINTER, _POINTER, _POINTER),
    "cuGraphExecDestroy": (_POINTER,),
    "cuGraphLaunch": (_POINTER, _POINTER),
}


def open_driver(path: str | None = None) -> ctypes.CDLL:
    """Return the driver's library with the prototypes of FUNCTIONS; raises PlatformError."""
    try:
        library = ctypes.CDLL(path or DRIVER)
    except OSError as error:
        raise PlatformError(
            f"the NVIDIA driver's library cannot be loaded: {error}",
            "this bundle needs a machine with an NVIDIA GPU and its driver",
        ) from error
    for name, types in FUNCTIONS.items():
        try:
            function = getattr(library, name)
        except AttributeError as error:
            raise PlatformError(
                f"the NVIDIA driver is too old: it has no {name}", "update it to 470 or newer"
            ) from error
        function.argtypes, function.restype = types, ctypes.c_int
    return library


# -- the GPU -----------------------------------------------------------------------------------

_OUT_OF_MEMORY, _NO_DEVICE = 2, 100
# After one of these the driver answers every later call of the process with the same error.
_FAULTS = {214, 220, 700, 702, 710, *range(714, 720)}
_LOST = "start the process again: it has lost the GPU"
_UNUSABLE_CODE = {200, 209, 218, 221, 222, 223, 300}  # images of code that this driver cannot take
_MAJOR, _MINOR = 75, 76  # CUdevice_attribute
_DYNAMIC_SHARED = 8  # CUfunction_attribute: the most dynamic shared memory of a launch
_OWN_STREAM, _NO_TIMING = 1, 2  # CU_STREAM_NON_BLOCKING, CU_EVENT_DISABLE_TIMING
_LEGACY = 1  # DLPack's name, and the driver's, of the legacy default stream


class DriverError(BertileError):
    """What a function of the driver answers, with its CUresult."""

    def __init__(self, what: str, code: int, remedy: str = ""):
        super().__init__(what, remedy)
        self.code = code


class OutOfMemory(BertileError):
    """The GPU's memory does not hold what is asked for."""


class Gpu:
    """One GPU of this process: its driver, and its primary context, which torch and cupy share.

    The context is the current one of a thread inside `with gpu`.
    """

    context, _process = None, 0  # nobody's, until there is a driver

    def __init__(self, driver: ctypes.CDLL, ordinal: int = 0):
        self._functions = {name: getattr(driver, name) for name in FUNCTIONS}
        self.context, self._process, self._fault = _POINTER(), os.getpid(), ""
        self.name, self.ordinal = "the GPU", ordinal
        # kernels are brought to the device when they are first used, not all of a module at once
        os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
        code = self._functions["cuInit"](0)
        if code == _NO_DEVICE:
            raise PlatformError(
                "the NVIDIA driver sees no GPU", "look at nvidia-smi and CUDA_VISIBLE_DEVICES"
            )
        if code:
            raise PlatformError(
                f"the NVIDIA driver does not start: {self._text(code)}", "look at nvidia-smi"
            )
        self.driver = self._number("cuDriverGetVersion")  # 12040 is CUDA 12.4
        count = self._number("cuDeviceGetCount")
        if type(ordinal) is not int or not 0 <= ordinal < count:
            known = "GPU 0" if count == 1 else f"GPUs 0 to {count - 1}"
            raise InputError(f"device is {ordinal!r}", f"this machine has {known}")
        self._device = self._number("cuDeviceGet", ordinal)
        text = ctypes.create_string_buffer(256)
        self.call("cuDeviceGetName", text, len(text), self._device)
        self.name = text.value.decode(errors="replace")
        self.capability = (self.attribute(_MAJOR), self.attribute(_MINOR))
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(self.context), self._device)

    def call(self, name: str, *arguments) -> None:
        """Call a function of the driver; raises BertileError for what it answers."""
        code = self._functions[name](*arguments)
        if code:
            raise self._error(name, code)

    def drop(self, name: str, *arguments) -> None:
        """Give something back, whatever state the device is in; from any thread."""
        if os.getpid() != self._process or not self.context:
            return
        if not self._functions["cuCtxPushCurrent_v2"](self.context):
            self._functions[name](*arguments)
            self._functions["cuCtxPopCurrent_v2"](ctypes.byref(_POINTER()))

    def check(self) -> None:
        """Raise BertileError where this process cannot use the GPU any more."""
        if self._fault:
            raise BertileError(self._fault, _LOST)
        if os.getpid() != self._process:
            raise BertileError(
                "the process was forked after the bundle was loaded",
                "load the bundle in the new process, and start that with 'spawn'",
            )

    def __enter__(self) -> Gpu:
        self.call("cuCtxPushCurrent_v2", self.context)
        return self

    def __exit__(self, *exception) -> None:
        self._functions["cuCtxPopCurrent_v2"](ctypes.byref(_POINTER()))

    def __del__(self):
        ended = sys.is_finalizing() or os.getpid() != self._process
        if self.context and not ended:
            self._functions["cuDevicePrimaryCtxRelease_v2"](self._device)

    def attribute(self, number: int) -> int:
        """One of the device's CUdevice_attributes."""
        return self._number("cuDeviceGetAttribute", number, self._device)

    def handle(self, name: str, *arguments) -> int:
        """Call a function that makes something; return its handle."""
        made = _POINTER()
        self.call(name, ctypes.byref(made), *arguments)
        return made.value

    def allocate(self, size: int, what: str) -> int:
        """Return the address of `size` bytes on the device."""
        address = _ADDRESS()
        code = self._functions["cuMemAlloc_v2"](ctypes.byref(address), max(size, 1))
        if code == _OUT_OF_MEMORY:
            free, total = _SIZE(), _SIZE()
            self.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
            raise OutOfMemory(
                f"{self.name} has too little memory: {what} need {_mib(size)} MiB, "
                f"{_mib(free.value)} of {_mib(total.value)} MiB are free",
                "take smaller batches, or end what else uses the GPU",
            )
        if code:
            raise self._error("cuMemAlloc_v2", code)
        return address.value

    def pin(self, size: int) -> int:
        """Return the address of `size` bytes of this machine's memory that the device can copy."""
        address = _POINTER()
        code = self._functions["cuMemHostAlloc"](ctypes.byref(address), max(size, 1), 0)
        if code == _OUT_OF_MEMORY:
            raise BertileError(
                f"this machine has too little memory: {_mib(size)} MiB cannot be pinned",
                "take smaller batches",
            )
        if code:
            raise self._error("cuMemHostAlloc", code)
        return address.value

    def _number(self, name: str, *arguments) -> int:
        number = _INT()
        self.call(name, ctypes.byref(number), *arguments)
        return number.value

    def _error(self, name: str, code: int) -> DriverError:
        if code in _FAULTS:
            self._fault = f"a kernel failed on {self.name}: {self._text(code)}"
            return DriverError(self._fault, code, _LOST)
        return DriverError(f"{name} fails on {self.name}: {self._text(code)}", code)

    def _text(self, code: int) -> str:
        texts = []
        for name in ("cuGetErrorName", "cuGetErrorString"):
            text = ctypes.c_char_p()
            if not self._functions[name](code, ctypes.byref(text)) and text.value:
                texts.append(text.value.decode(errors="replace"))
        return " (".join(texts) + ")" * (len(texts) - 1) if texts else f"error {code}"


def _mib(size: int) -> int:
    return -(-size >> 20)


# -- kernels and weights -----------------------------------------------------------------------

_CHUNK = 8 << 20  # bytes of pinned memory that the weights go through, twice


class _Code:
    """What all workspaces share on the device: the weights, and the kernels by their entries."""

    def __init__(self, gpu: Gpu, manifest: dict, plan: Plan, files: Mapping[str, Path]):
        self._gpu, self._module, self._base = gpu, None, None
        self.functions: dict[str, int] = {}
        try:
            data, places = loader.map_tensors(files[loader.WEIGHTS], plan.weights)
            self._base = gpu.allocate(len(data), "the weights")
            _bring_up(gpu, files[loader.WEIGHTS], self._base, len(data))
            self.weights = [self._base + place.begin for place in places]
            self._module = _load_module(gpu, manifest, files)
            for entry, shared in plan.entries.items():
                self.functions[entry] = self._function(entry, shared)
        except BaseException:
            self.close()
            raise

    def _function(self, entry: str, shared: int) -> int:
        try:
            function = self._gpu.handle("cuModuleGetFunction", self._module, entry.encode())
        except DriverError as error:
            raise BundleError(f"the kernels lack '{entry}': {error.what}", AGAIN) from error
        if shared:  # beyond 48 KiB, with what the kernel has of its own, only for those who ask
            self._gpu.call("cuFuncSetAttribute", function, _DYNAMIC_SHARED, shared)
        return function

    def close(self) -> None:
        if self._module is not None:
            self._gpu.drop("cuModuleUnload", self._module)
        if self._base is not None:
            self._gpu.drop("cuMemFree_v2", self._base)
        self._module = self._base = None


def _bring_up(gpu: Gpu, path: Path, address: int, size: int) -> None:
    """Read a file into device memory, through two pinned pieces that take turns."""
    chunk = max(1, min(size, _CHUNK))
    pinned = gpu.pin(2 * chunk)
    stream, events = None, []
    try:
        stream = gpu.handle("cuStreamCreate", _OWN_STREAM)
        events += [gpu.handle("cuEventCreate", _NO_TIMING) for _ in range(2)]
        with path.open("rb", buffering=0) as file:
            for turn, at in enumerate(range(0, size, chunk)):
                half, length = turn % 2, min(chunk, size - at)
                if turn > 1:
                    gpu.call("cuEventSynchronize", events[half])
                _read(file, _memory(pinned + half * chunk, length))
                gpu.call(
                    "cuMemcpyHtoDAsync_v2", address + at, pinned + half * chunk, length, stream
                )
                gpu.call("cuEventRecord", events[half], stream)
        gpu.call("cuStreamSynchronize", stream)
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from error
    finally:
        for event in events:
            gpu.drop("cuEventDestroy_v2", event)
        if stream is not None:
            gpu.drop("cuStreamSynchronize", stream)
            gpu.drop("cuStreamDestroy_v2", stream)
        gpu.drop("cuMemFreeHost", pinned)


def _read(file, memory: np.ndarray) -> None:
    view = memoryview(memory)
    while len(view):
        count = file.readinto(view)
        if not count:
            raise BundleError(f"{file.name} is truncated", "copy or compile the bundle again")
        view = view[count:]


def _memory(address: int, size: int) -> np.ndarray:
    """The bytes at an address of this process."""
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8)


def _load_module(gpu: Gpu, manifest: dict, files: Mapping[str, Path]) -> int:
    """The bundle's code for this card: its cubin, or its PTX, which the driver compiles."""
    target = manifest["target"]
    found = [re.fullmatch(r"sm_(\d+)(\d)a?", feature) for feature in target["features"]]
    if not (found := [match for match in found if match]):
        raise BundleError("the manifest's 'target' names no compute capability", AGAIN)
    row, here = tuple(map(int, found[0].groups())), gpu.capability
    if row[0] == here[0] and row[1] <= here[1]:
        return _link(gpu, files[CUBIN])
    level = _ptx_level(files[PTX]) if PTX in files else None
    if level is None or level > here:
        wanted, have = (f"{major}.{minor}" for major, minor in (row, here))
        raise PlatformError(
            f"the bundle is for GPUs of compute capability {wanted}, {gpu.name} has {have}",
            f"compile the model with --target cuda-sm{here[0]}{here[1]}",
        )
    return _link(gpu, files[PTX])


def _ptx_level(path: Path) -> tuple[int, int] | None:
    """The oldest compute capability that PTX may be compiled for; None where it is for one only."""
    with path.open("rb") as file:
        found = re.search(
            rb"^\s*\.target\s+sm_(\d+)(\d)([af]?)\b", file.read(1 << 16), re.MULTILINE
        )
    return (int(found[1]), int(found[2])) if found and not found[3] else None


def _link(gpu: Gpu, path: Path) -> int:
    """Load cubin, or PTX; raises PlatformError with what the driver's compiler says."""
    image, log = path.read_bytes() + b"\0", ctypes.create_string_buffer(4096)
    options = (_INT * 2)(5, 6)  # CU_JIT_ERROR_LOG_BUFFER, CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES
    values = (_POINTER * 2)(ctypes.addressof(log), len(log))
    try:
        return gpu.handle("cuModuleLoadDataEx", image, 2, options, values)
    except DriverError as error:
        if error.code not in _UNUSABLE_CODE:
            raise
        said = " ".join(log.value.decode(errors="replace").split())[:300]
        version = f"{gpu.driver // 1000}.{gpu.driver % 1000 // 10}"
        raise PlatformError(
            f"the driver of {gpu.name}, for CUDA {version}, cannot take {path.name}: {error.what}"
            + (f": {said}" if said else ""),
            "update the driver, or compile the model with an older CUDA compiler",
        ) from error


# -- the plan ----------------------------------------------------------------------------------

_WRONG = (KeyError, TypeError, ValueError, IndexError, AttributeError, struct.error)


def _read_plan(path: Path, manifest: dict) -> Plan:
    try:
        return Plan(json.loads(path.read_bytes().decode()), manifest)
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from error
    except (*_WRONG, RecursionError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise BundleError(f"{path} is damaged: {what}", AGAIN) from error


class _Step(NamedTuple):
    """One launch; extents are numbers in the plan's list of extents."""

    entry: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    when: int | None
    arguments: tuple[tuple[str, int | float], ...]

    def numbers(self, kind: str) -> list[int]:
        """The buffers or inputs that are among the arguments."""
        return [number for one, number in self.arguments if one == kind]


class Plan:
    """plan.json, checked: inputs, weights, buffers, outputs and launches of any shape."""

    def __init__(self, plan: dict, manifest: dict):
        if plan["schema"] != SCHEMA:
            raise ValueError(f"it has schema {plan['schema']}, this loader reads {SCHEMA}")
        self._extents: dict[Extent, int] = {}
        self._rooms: dict[tuple, Layout] = {}
        self._lock = threading.RLock()
        self._inputs = [self._array(spec) for spec in plan["inputs"]]
        self._outputs = [(*self._array(spec), spec["buffer"]) for spec in plan["outputs"]]
        self._buffers = [self._extent(spec["bytes"]) for spec in plan["buffers"]]
        self.weights: list[str] = plan["weights"]
        self.steps = [self._step(spec) for spec in plan["steps"]]
        self.entries: dict[str, int] = {}  # entry: the most shared memory of its launches
        for step in self.steps:
            self.entries[step.entry] = max(step.shared, self.entries.get(step.entry, 0))
        names = [spec["name"] for spec in plan["inputs"]][:-1]
        if names != [spec["name"] for spec in manifest["inputs"]]:
            raise ValueError(f"its inputs are not those of the manifest: {', '.join(names)}")
        names = [spec["name"] for spec in plan["outputs"]]
        if names != [spec["name"] for spec in manifest["outputs"]]:
            raise ValueError(f"its outputs are not those of the manifest: {', '.join(names)}")
        buffers = [buffer for _, _, buffer in self._outputs]
        if len(set(buffers)) < len(buffers) or not set(buffers) <= set(range(len(self._buffers))):
            raise ValueError("two outputs share a buffer, or have none")
        if not self.steps or manifest["lanes"] != TOKENS:
            raise ValueError(f"it has no steps, or the manifest's 'lanes' is not {TOKENS}")

    def _extent(self, extent: Extent) -> int:
        _check_extent(extent, _SYMBOLS)
        return self._extents.setdefault(extent, len(self._extents))

    def _array(self, spec: dict) -> tuple[np.dtype, tuple[int, ...]]:
        return np.dtype(spec["dtype"]), tuple(map(self._extent, spec["shape"]))

    def _step(self, spec: dict) -> _Step:
        limits = {
            "input": len(self._inputs), "weight": len(self.weights), "buffer": len(self._buffers)
        }  # fmt: skip
        entry, threads, shared = spec["entry"], spec["threads"], spec["shared"]
        if not isinstance(entry, str) or type(threads) is not int or type(shared) is not int:
            raise TypeError(f"the step {entry} is not described as it should be")
        if not 0 < threads <= 1024 or shared < 0 or len(spec["grid"]) != 3:
            raise ValueError(f"the step {entry} has {threads} threads, {shared} bytes shared")
        arguments = []
        for kind, value in spec["arguments"]:
            if kind in limits:
                if type(value) is not int or not 0 <= value < limits[kind]:
                    raise ValueError(f"the step {entry} names {kind} {value}, which does not exist")
            elif kind in ("int32", "int64"):
                value = self._extent(value)
            elif kind == "float32":
                struct.pack("<f", value)
            else:
                raise ValueError(f"the step {entry} has an argument of the kind {kind}")
            arguments.append((kind, value))
        grid = tuple(map(self._extent, spec["grid"]))
        when = self._extent(spec["when"]) if "when" in spec else None
        return _Step(entry, grid, threads, shared, when, tuple(arguments))

    def layout(self, batch: int, length: int, blocks: int) -> Layout:
        """What a request of this shape needs.

        Requests of unequal lengths have the places of buffers that as many whole lengths would
        have: they are of many sizes, and finding places takes longer than all else.
        """
        values = self._values(batch, length, blocks)
        chosen = [step.when is None or values[step.when] != 0 for step in self.steps]
        steps = [step for step, used in zip(self.steps, chosen) if used]
        key = (batch, length, *chosen)
        with self._lock:
            if key not in self._rooms:
                most = self._values(batch, length, batch * -(-length // TOKENS))
                self._rooms[key] = Layout(self, most, steps)
                while len(self._rooms) > GRAPHS:
                    del self._rooms[next(iter(self._rooms))]
            return Layout(self, values, steps, self._rooms[key])

    def _values(self, batch: int, length: int, blocks: int) -> tuple[int, ...]:
        """The values of all extents."""
        try:
            values = _compiled(tuple(self._extents), _SYMBOLS)(batch, length, blocks)
        except ZeroDivisionError as error:
            raise BundleError("the plan divides by zero", AGAIN) from error
        return tuple(map(int, values))


_SYMBOLS = ("batch", "length", "blocks")
_GRID = (2**31 - 1, 65535, 65535)
ALIGNMENT = 256  # bytes, of everything in an arena


class _Array(NamedTuple):
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


class Layout:
    """Where everything lies in an arena for one shape, and its launches with what they wait for.

    The arena is [outputs | inputs | other buffers], so that one copy brings the outputs down and
    one the inputs up. `after` has for each step the earlier steps that it waits for. Places are
    those of a larger layout of the same steps where everything fits there.
    """

    def __init__(
        self,
        plan: Plan,
        values: tuple[int, ...],
        steps: list[_Step],
        larger: Layout | None = None,
    ):
        self.values, self.steps = values, steps
        arrays = [self._array(*one[:2]) for one in (*plan._outputs, *plan._inputs)]
        end = 0
        for index, array in enumerate(arrays):
            arrays[index] = array._replace(offset=end)
            end += _aligned(array.bytes)
        count = len(plan._outputs)
        self.outputs, self.inputs = arrays[:count], arrays[count:]
        self.output_bytes = self.inputs[0].offset
        self.input_bytes = end - self.output_bytes
        self.sizes = [values[extent] for extent in plan._buffers]
        if min(self.sizes, default=0) < 0:
            raise BundleError("the plan has a buffer of negative size", AGAIN)
        fixed = {}
        for array, (_, _, buffer) in zip(self.outputs, plan._outputs):
            if self.sizes[buffer] > _aligned(array.bytes):
                raise BundleError(f"the plan's buffer {buffer} is larger than its output", AGAIN)
            fixed[buffer] = array.offset
        self.output_buffers = {buffer: index for index, buffer in enumerate(fixed)}
        if larger is not None and self._fits(larger, end):
            self.buffers, self.bytes, self.after = larger.buffers, larger.bytes, larger.after
        else:
            self._arrange(fixed, end)

    def _fits(self, larger: Layout, end: int) -> bool:
        return (
            self.output_bytes == larger.output_bytes
            and end <= larger.output_bytes + larger.input_bytes
            and all(size <= room for size, room in zip(self.sizes, larger.sizes))
        )

    def _arrange(self, fixed: dict[int, int], end: int) -> None:
        """Find places for all buffers beside the outputs, behind `end`."""
        lives = self._lives(fixed)
        offsets, size = place_buffers([self.sizes[one] for one in lives], list(lives.values()))
        self.buffers = {**fixed, **{one: end + offset for one, offset in zip(lives, offsets)}}
        self.bytes = end + size
        spans = {
            one: (begin, begin + max(1, self.sizes[one])) for one, begin in self.buffers.items()
        }
        self.after = order([step.numbers("buffer") for step in self.steps], spans)

    def _array(self, dtype: np.dtype, shape: tuple[int, ...]) -> _Array:
        sizes = tuple(self.values[extent] for extent in shape)
        if min(sizes, default=1) < 1:
            raise BundleError(f"the plan has an input or output of shape {sizes}", AGAIN)
        return _Array(0, dtype, sizes)

    def _lives(self, fixed: Iterable[int]) -> dict[int, tuple[int, int]]:
        """For each buffer beside the outputs, the first and the last step that use it."""
        lives: dict[int, tuple[int, int]] = {}
        for number, step in enumerate(self.steps):
            for buffer in step.numbers("buffer"):
                if buffer not in fixed:
                    lives[buffer] = (lives.get(buffer, (number, 0))[0], number)
        return lives


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def place_buffers(sizes: Sequence[int], lives: Sequence[tuple[int, int]]) -> tuple[list[int], int]:
    """Return offsets for buffers of so many bytes, live from a first to a last step, and the end.

    Greedy: the largest first, each into the smallest gap that takes it among those that it shares
    a step with (Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net Inference").
    """
    offsets, end = [0] * len(sizes), 0
    placed: list[tuple[int, int, int, int]] = []  # offset, end, first step, last step
    for index in sorted(range(len(sizes)), key=lambda one: -sizes[one]):
        first, last = lives[index]
        need, best, room, at = max(ALIGNMENT, _aligned(sizes[index])), None, None, 0
        for begin, until, since, to in placed:  # by their offsets
            if since > last or to < first:
                continue
            gap = begin - at
            if gap >= need and (room is None or gap < room):
                best, room = at, gap
            at = max(at, until)
        offsets[index] = at if best is None else best
        bisect.insort(placed, (offsets[index], offsets[index] + need, first, last))
        end = max(end, offsets[index] + need)
    return offsets, end


def order(uses: Sequence[Sequence[int]], spans: Mapping[int, tuple[int, int]]) -> list[list[int]]:
    """Return for each step which earlier ones it must wait for, given the buffers that each uses.

    Two steps that touch the same bytes run one after the other, whether they read or write; what
    follows from the other edges is left out.
    """
    names = list(spans)
    begins, ends = (np.array([spans[one][side] for one in names]) for side in (0, 1))
    meets = (begins[:, None] < ends[None]) & (begins[None] < ends[:, None])
    touch = {one: 1 << bit for bit, one in enumerate(names)}
    bits = np.packbits(meets, axis=1, bitorder="little")
    meet = {one: int.from_bytes(row.tobytes(), "little") for one, row in zip(names, bits)}
    touched: list[int] = []
    before: list[int] = []  # for each step a bit for every step that is sure to have ended
    after: list[list[int]] = []
    for number, used in enumerate(uses):
        wanted = functools.reduce(int.__or__, (meet[one] for one in used), 0)
        waits, known, everything = [], 0, (1 << number) - 1
        for earlier in range(number - 1, -1, -1):
            if known == everything:
                break
            if not known >> earlier & 1 and touched[earlier] & wanted:
                waits.append(earlier)
                known |= before[earlier] | 1 << earlier
        touched.append(functools.reduce(int.__or__, (touch[one] for one in used), 0))
        before.append(known)
        after.append(waits)
    return after


# -- workspaces and graphs ---------------------------------------------------------------------


class _Workspace:
    """What one request at a time runs in: a stream, an arena, pinned staging memory and graphs."""

    def __init__(self, gpu: Gpu, plan: Plan, code: _Code, manifest: dict):
        self._gpu, self._plan, self._code = gpu, plan, code
        self._fills = [loader.FILL.get(spec["default"]) for spec in manifest["inputs"]]
        self._names = [spec["name"] for spec in manifest["inputs"]]
        self._arena = self._arena_bytes = self._staging = 0
        self._memory = _NOTHING  # the staging memory
        self.graphs: OrderedDict[tuple, _Graph] = OrderedDict()
        self.last: int | None = None  # the stream of the last launch
        self._pending = False  # whether that may still run
        self.stream = gpu.handle("cuStreamCreate", _OWN_STREAM)
        try:
            self._event = gpu.handle("cuEventCreate", _NO_TIMING)
        except BaseException:
            gpu.drop("cuStreamDestroy_v2", self.stream)
            raise

    def is_free(self, stream: int | None) -> bool:
        """Whether a launch on the stream (None: on its own) has to wait for no other stream."""
        return not self._pending or self.last == (self.stream if stream is None else stream)

    def graph(self, key: tuple) -> _Graph:
        """The graph of a kind ("full", "bare" or "device"), (batch, length) and blocks."""
        if key[0] != "device" and self._pending:
            self.settle()  # its staging memory is written next
        graph = self.graphs.get(key)
        if graph is None:
            self.settle()
            layout = self._plan.layout(*key[1:4])
            self._grow(layout, staging=key[0] != "device")
            graph = self._made(key, layout)
            while len(self.graphs) >= GRAPHS:
                self.graphs.popitem(last=False)[1].close()
            self.graphs[key] = graph
        else:
            self.graphs.move_to_end(key)
        return graph

    def _made(self, key: tuple, layout: Layout) -> _Graph:
        base, constants = self._arena, None
        inputs = [base + array.offset for array in layout.inputs]
        if key[0] == "device":
            constants, inputs = self._constants(layout, key[4])
        staging = self._memory if key[0] != "device" else None
        try:
            return _Graph(
                self._gpu, self._code, layout, base, inputs, staging, constants, key[0] == "full"
            )
        except BaseException:
            if constants is not None:
                self._gpu.drop("cuMemFree_v2", constants)
            raise

    def _constants(self, layout: Layout, given: tuple[str, ...]) -> tuple[int, list[int]]:
        """Bring up the table, and what inputs that are not given are filled with."""
        batch, length = layout.inputs[0].shape
        memory = np.zeros(layout.input_bytes, np.uint8)
        for array, name, fill in zip(layout.inputs, self._names, self._fills):
            if name not in given:
                _view(memory, array, layout.output_bytes).fill(fill)
        table = loader.blocks_of(np.full(batch, length), TOKENS)
        _view(memory, layout.inputs[-1], layout.output_bytes)[...] = table
        address = self._gpu.allocate(len(memory), "the inputs")
        try:
            source = memory.ctypes.data
            self._gpu.call("cuMemcpyHtoDAsync_v2", address, source, len(memory), self.stream)
            self._gpu.call("cuStreamSynchronize", self.stream)
        except BaseException:
            self._gpu.drop("cuMemFree_v2", address)
            raise
        shift = address - layout.output_bytes
        return address, [array.offset + shift for array in layout.inputs]

    def _grow(self, layout: Layout, staging: bool) -> None:
        """Take a larger arena or staging memory where the layout needs it; graphs end with them."""
        pinned = layout.input_bytes + layout.output_bytes if staging else 0
        if layout.bytes <= self._arena_bytes and pinned <= len(self._memory):
            return
        self._drop_graphs()
        if layout.bytes > self._arena_bytes:
            if self._arena:
                self._gpu.drop("cuMemFree_v2", self._arena)
            self._arena = self._arena_bytes = 0
            self._arena = self._gpu.allocate(_rounded(layout.bytes), "the activations")
            self._arena_bytes = _rounded(layout.bytes)
        if pinned > len(self._memory):
            if self._staging:
                self._gpu.drop("cuMemFreeHost", self._staging)
            self._staging, self._memory = 0, _NOTHING
            self._staging = self._gpu.pin(_rounded(pinned))
            self._memory = _memory(self._staging, _rounded(pinned))

    def bring_up(self, layout: Layout) -> None:
        """Copy the inputs out of the staging memory, for a graph that does not."""
        target = self._arena + layout.output_bytes
        size = layout.input_bytes
        self._gpu.call("cuMemcpyHtoDAsync_v2", target, self._staging, size, self.stream)

    def launch(self, graph: _Graph, stream: int) -> None:
        """Put the graph on a stream, behind what still runs in this workspace."""
        if self._pending and self.last != stream:
            if self.last == self.stream:
                self.settle()
            else:
                self._gpu.call("cuStreamWaitEvent", stream, self._event, 0)
        self.last, self._pending = stream, True
        self._gpu.call("cuGraphLaunch", graph.executable, stream)
        if stream != self.stream:
            self._gpu.call("cuEventRecord", self._event, stream)

    def wait(self) -> None:
        """Wait for the last launch."""
        self._gpu.call("cuStreamSynchronize", self.last)
        self._pending = False

    def settle(self) -> None:
        """Wait until nothing runs in this workspace any more."""
        if self._pending and self.last == self.stream:
            self._gpu.call("cuStreamSynchronize", self.stream)
        elif self._pending:
            self._gpu.call("cuEventSynchronize", self._event)
        self._pending = False

    def time(self, graph: _Graph, repeats: int, warm: int) -> np.ndarray:
        """Milliseconds of each of `repeats` launches, after `warm` that do not count."""
        gpu, events = self._gpu, []
        try:
            events += [gpu.handle("cuEventCreate", 0) for _ in range(2 * repeats)]
            for _ in range(warm):
                self.launch(graph, self.stream)
            for begin, end in zip(events[::2], events[1::2]):
                gpu.call("cuEventRecord", begin, self.stream)
                self.launch(graph, self.stream)
                gpu.call("cuEventRecord", end, self.stream)
            self.wait()
            return np.array([_elapsed(gpu, *pair) for pair in zip(events[::2], events[1::2])])
        finally:
            for event in events:
                gpu.drop("cuEventDestroy_v2", event)

    def _drop_graphs(self) -> None:
        while self.graphs:
            self.graphs.popitem()[1].close()

    def close(self) -> None:
        if self._pending and self.last == self.stream:
            self._gpu.drop("cuStreamSynchronize", self.stream)
        elif self._pending:
            self._gpu.drop("cuEventSynchronize", self._event)
        self._drop_graphs()
        self._gpu.drop("cuEventDestroy_v2", self._event)
        self._gpu.drop("cuStreamDestroy_v2", self.stream)
        if self._arena:
            self._gpu.drop("cuMemFree_v2", self._arena)
        if self._staging:
            self._gpu.drop("cuMemFreeHost", self._staging)


_NOTHING = np.empty(0, np.uint8)


def _rounded(size: int) -> int:
    return -(-size >> 21) << 21  # the driver hands memory out in pieces of 2 MiB


def _elapsed(gpu: Gpu, begin: int, end: int) -> float:
    milliseconds = ctypes.c_float()
    gpu.call("cuEventElapsedTime", ctypes.byref(milliseconds), begin, end)
    return milliseconds.value


def _view(memory: np.ndarray, array: _Array, shift: int = 0) -> np.ndarray:
    begin = array.offset - shift
    return memory[begin : begin + array.bytes].view(array.dtype).reshape(array.shape)


class _Graph:
    """All launches of one shape as one executable graph; with copies, or with what may be moved.

    `up` and `down` are the inputs and outputs in the staging memory, [inputs | outputs].
    """

    def __init__(
        self,
        gpu: Gpu,
        code: _Code,
        layout: Layout,
        base: int,
        inputs: list[int],
        staging: np.ndarray | None,
        constants: int | None,
        copies: bool,
    ):
        self._gpu, self.layout, self._constants = gpu, layout, constants
        self._pointers = {"weight": code.weights, "input": inputs}
        self._pointers["buffer"] = {one: base + at for one, at in layout.buffers.items()}
        self._movable: list[tuple] = []
        self._at: list = [*inputs[:-1], *(base + array.offset for array in layout.outputs)]
        self._own = tuple(self._at)
        self.up, self.down = [], []
        if staging is not None:
            split = layout.input_bytes
            self.up = [_view(staging, array, layout.output_bytes) for array in layout.inputs]
            self.down = [_view(staging[split:], array) for array in layout.outputs]
        self.executable = None
        self._graph = gpu.handle("cuGraphCreate", 0)
        try:
            self._add_nodes(code, base, staging.ctypes.data if copies else None)
            self.executable = gpu.handle("cuGraphInstantiateWithFlags", self._graph, 0)
            if staging is not None:  # its nodes stay as they are
                self._movable.clear()
                gpu.call("cuGraphDestroy", self._graph)
                self._graph = None
        except BaseException:
            self._constants = None  # whoever gave them keeps them
            self.close()
            raise

    def _add_nodes(self, code: _Code, base: int, staging: int | None) -> None:
        layout, nodes = self.layout, []
        first = last = []
        if staging is not None:
            begin = base + layout.output_bytes
            first = [self._copy([], staging, 1, begin, 2, layout.input_bytes)]
        for step, waits in zip(layout.steps, layout.after):
            nodes.append(self._kernel(code, step, [nodes[one] for one in waits] or first))
        if staging is not None:
            waited = {one for waits in layout.after for one in waits}
            last = [node for number, node in enumerate(nodes) if number not in waited]
            down = staging + layout.input_bytes
            self._copy(last, base, 2, down, 1, layout.output_bytes)

    def _kernel(self, code: _Code, step: _Step, waits: list[int]) -> int:
        values = self.layout.values
        cells = (_ADDRESS * len(step.arguments))(
            *(self._cell(kind, value) for kind, value in step.arguments)
        )
        at = ctypes.addressof(cells)
        places = (_POINTER * len(cells))(*range(at, at + 8 * len(cells), 8))
        grid = [values[extent] for extent in step.grid]
        if not all(0 < size <= limit for size, limit in zip(grid, _GRID)):
            raise BundleError(f"the plan launches {step.entry} on a grid of {grid}", AGAIN)
        params = KernelNode(
            code.functions[step.entry],
            (_UNSIGNED * 3)(*grid),
            (_UNSIGNED * 3)(step.threads, 1, 1),
            step.shared,
            ctypes.addressof(places),
        )
        node = self._add("cuGraphAddKernelNode", waits, ctypes.byref(params))
        outputs, count = self.layout.output_buffers, len(self.layout.inputs) - 1
        moved = [
            (cell, count + outputs[value] if kind == "buffer" else value)
            for cell, (kind, value) in enumerate(step.arguments)
            if (kind == "input" and value < count) or (kind == "buffer" and value in outputs)
        ]
        if moved:
            self._movable.append((node, params, cells, places, moved))
        return node

    def _cell(self, kind: str, value: int | float) -> int:
        """An argument as the 8 bytes, lowest first, that its parameter is read from."""
        if kind == "float32":
            return int.from_bytes(struct.pack("<f", value), "little")
        if kind in self._pointers:
            return self._pointers[kind][value]
        number, bits = self.layout.values[value], int(kind[3:])
        if not -(1 << bits - 1) <= number < 1 << bits - 1:
            raise BundleError(f"the plan gives {number} as {kind}", "take a smaller batch")
        return number & (1 << bits) - 1

    def _copy(
        self, waits: list[int], source: int, kind: int, target: int, other: int, size: int
    ) -> int:
        params = MemcpyNode(bytes=size, height=1, depth=1, source_kind=kind, target_kind=other)
        setattr(params, "source_host" if kind == 1 else "source_device", source)
        setattr(params, "target_host" if other == 1 else "target_device", target)
        return self._add("cuGraphAddMemcpyNode", waits, ctypes.byref(params), self._gpu.context)

    def _add(self, name: str, waits: list[int], *rest) -> int:
        before = (_POINTER * len(waits))(*waits)
        return self._gpu.handle(name, self._graph, before, len(waits), *rest)

    def point(self, inputs: Sequence[int | None], outputs: Sequence[int]) -> None:
        """Let the kernels read and write elsewhere; None is what the graph has of its own."""
        wanted = [own if new is None else new for own, new in zip(self._own, (*inputs, *outputs))]
        if wanted == self._at:
            return
        before, self._at = self._at, [None] * len(wanted)  # unknown, should one of them fail
        for node, params, cells, _, moved in self._movable:
            for cell, number in moved:
                cells[cell] = wanted[number]
            if any(wanted[number] != before[number] for _, number in moved):
                self._gpu.call(
                    "cuGraphExecKernelNodeSetParams", self.executable, node, ctypes.byref(params)
                )
        self._at = wanted

    def close(self) -> None:
        if self.executable is not None:
            self._gpu.drop("cuGraphExecDestroy", self.executable)
        if self._graph is not None:
            self._gpu.drop("cuGraphDestroy", self._graph)
        if self._constants is not None:
            self._gpu.drop("cuMemFree_v2", self._constants)
        self.executable = self._graph = self._constants = None


# -- arrays on the device ----------------------------------------------------------------------

_CUDA, _MANAGED = 2, 13  # DLDeviceType
_NAME = b"dltensor"


class DeviceArray:
    """A result on the GPU, which torch, cupy and whatever else reads DLPack take over in place.

    Its memory goes back to the model when the last that uses it is gone.
    """

    def __init__(self, block: _Block, shape: tuple[int, ...], dtype: np.dtype):
        self._block, self.shape, self.dtype = block, shape, dtype

    @property
    def pointer(self) -> int:
        """Its address on the device."""
        return self._block.address

    def __dlpack_device__(self) -> tuple[int, int]:
        return _CUDA, self._block.gpu.ordinal

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        """A capsule that holds the array until its consumer calls the deleter.

        Work that the consumer puts on `stream` runs after the model has written the array.
        """
        if copy or dl_device not in (None, self.__dlpack_device__()):
            raise BufferError("a result of the model is given as it is, not copied")
        if stream != -1:
            self._block.lend(_stream_handle(stream))
        new, delete, destroy = _capsules()
        sizes = (ctypes.c_int64 * len(self.shape))(*self.shape)
        code, bits = {"i": 0, "u": 1, "f": 2}[self.dtype.kind], self.dtype.itemsize * 8
        tensor = loader.DLTensor(
            self.pointer, *self.__dlpack_device__(), len(sizes), code, bits, 1, sizes
        )
        managed = loader.DLManagedTensor(tensor, None, ctypes.cast(delete, _POINTER))
        address = ctypes.addressof(managed)
        _exported[address] = managed, sizes, self._block
        return new(address, _NAME, ctypes.cast(destroy, _POINTER))

    @property
    def __cuda_array_interface__(self) -> dict:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.pointer, False),
            "version": 3,
            "stream": self._block.stream or _LEGACY,
        }

    def __repr__(self) -> str:
        return f"DeviceArray({self.shape}, {self.dtype}, GPU {self._block.gpu.ordinal})"


_exported: dict[int, tuple] = {}  # what lives until the deleter of a DLManagedTensor is called


@functools.cache
def _capsules() -> tuple:
    """PyCapsule_New, the deleter of our tensors, and the destructor of capsules nobody took."""
    new, valid, pointer = (
        ctypes.pythonapi[f"PyCapsule_{name}"] for name in ("New", "IsValid", "GetPointer")
    )
    new.argtypes, new.restype = (_POINTER, ctypes.c_char_p, _POINTER), ctypes.py_object
    for function, result in ((valid, _INT), (pointer, _POINTER)):
        function.argtypes, function.restype = (_POINTER, ctypes.c_char_p), result

    def delete(address: int) -> None:
        _exported.pop(address, None)

    def destroy(capsule: int) -> None:  # as an address: the object has no references any more
        if valid(capsule, _NAME):
            delete(pointer(capsule, _NAME))

    return new, ctypes.CFUNCTYPE(None, _POINTER)(delete), ctypes.PYFUNCTYPE(None, _POINTER)(destroy)


class _Block:
    """Memory of one result, written on one stream; it goes back when nothing refers to it."""

    def __init__(self, results: _Results, address: int, size: int, stream: int):
        self._results, self.gpu = results, results.gpu
        self.address, self.size, self.stream = address, size, stream
        self.borrowers: set[int] = set()  # other streams that may use it

    def lend(self, stream: int) -> None:
        """Let a stream wait for what is now on the block's own."""
        if stream != self.stream:
            self.borrowers.add(stream)
            with self.gpu:
                _follow(self.gpu, stream, self.stream)

    def __del__(self):
        if not sys.is_finalizing():
            self._results.give_back(self)


class _Results:
    """Memory of results: what comes back is used again by the next request on the same stream."""

    def __init__(self, gpu: Gpu):
        self.gpu, self._closed = gpu, False
        self._free: OrderedDict[tuple[int, int], list[int]] = OrderedDict()
        self._lock = threading.RLock()  # a block may go back while the collector runs in `take`

    def take(self, array: _Array, stream: int) -> DeviceArray:
        """Return memory for an array that is written on a stream."""
        size = _aligned(array.bytes)
        with self._lock:
            kept = self._free.get((stream, size))
            address = kept.pop() if kept else None
        if address is None:
            address = self.gpu.allocate(size, "the outputs")
        return DeviceArray(_Block(self, address, size, stream), array.shape, array.dtype)

    def give_back(self, block: _Block) -> None:
        try:
            self.gpu.check()
            with self.gpu:
                for stream in block.borrowers:
                    _follow(self.gpu, block.stream, stream)
        except BertileError:  # the device is lost, or a stream has ended
            self.gpu.drop("cuMemFree_v2", block.address)
            return
        with self._lock:
            if not self._closed:
                self._free.setdefault((block.stream, block.size), []).append(block.address)
                self._free.move_to_end((block.stream, block.size))
            surplus = self._surplus(0 if self._closed else CACHED)
        for address in [block.address] if self._closed else surplus:
            self.gpu.drop("cuMemFree_v2", address)

    def _surplus(self, limit: int) -> list[int]:
        """Take out what is beyond the limit, the longest unused first."""
        count = sum(map(len, self._free.values())) - limit
        found: list[int] = []
        while len(found) < count:
            key, kept = next(iter(self._free.items()))
            if kept:
                found.append(kept.pop())
            else:
                del self._free[key]
        return found

    def clear(self) -> None:
        """Give the device what no result holds."""
        with self._lock:
            surplus = self._surplus(0)
        for address in surplus:
            self.gpu.drop("cuMemFree_v2", address)

    def close(self) -> None:
        """Keep nothing any more."""
        self._closed = True
        self.clear()


def _follow(gpu: Gpu, stream: int, other: int) -> None:
    """Let `stream` wait for what is on `other` by now."""
    event = gpu.handle("cuEventCreate", _NO_TIMING)
    try:
        gpu.call("cuEventRecord", event, other)
        gpu.call("cuStreamWaitEvent", stream, event, 0)
    finally:
        gpu.drop("cuEventDestroy_v2", event)


def _stream_handle(stream) -> int:
    """The driver's handle of a stream of torch or cupy, or of an integer; 0 is the default one."""
    for name in ("cuda_stream", "ptr"):
        stream = getattr(stream, name, stream)
    if stream is None or stream == _LEGACY:
        return 0
    if isinstance(stream, bool) or not isinstance(stream, int) or stream < 0:
        raise InputError(f"stream is {stream!r}", "give an integer, or a stream of torch or cupy")
    return stream


def _on_device(value) -> bool:
    if value is None or isinstance(value, (np.ndarray, list, tuple)):
        return False
    place = getattr(value, "__dlpack_device__", None)
    return place is not None and place()[0] in (_CUDA, _MANAGED)


class _Given(NamedTuple):
    pointer: int
    shape: tuple[int, ...]


def _borrow_all(inputs: dict, specs: list[dict], gpu: Gpu, stream: int) -> dict[str, _Given]:
    """Where the given arrays lie on the device; each (batch, length), of one shape, checked."""
    named = loader.check_names(inputs, specs)
    dtypes = {spec["name"]: np.dtype(spec["dtype"]) for spec in specs}
    given = {name: _borrow(name, value, dtypes[name], gpu, stream) for name, value in named.items()}
    first, (_, shape) = next(iter(given.items()))
    if len(shape) != 2 or 0 in shape:
        raise InputError(f"{first} has shape {shape}", "give (batch, length), for one text [ids]")
    for name, one in given.items():
        if one.shape != shape:
            raise InputError(f"{name} has shape {one.shape}, but {first} has {shape}")
    return given


def _borrow(name: str, value, dtype: np.dtype, gpu: Gpu, stream: int) -> _Given:
    if not _on_device(value):
        raise InputError(f"{name} is not on the GPU, but another input is", "give all on one")
    number = value.__dlpack_device__()[1]
    if number != gpu.ordinal:
        raise InputError(f"{name} is on GPU {number}, the model is on GPU {gpu.ordinal}")
    capsule = value.__dlpack__(stream=stream or _LEGACY)
    tensor = loader.DLManagedTensor.from_address(_capsule_pointer()(capsule, _NAME)).tensor
    shape = tuple(tensor.shape[: tensor.rank])
    if (tensor.code, tensor.bits, tensor.lanes) != ("iu".index(dtype.kind), dtype.itemsize * 8, 1):
        raise InputError(f"{name} is not {dtype}", f"convert it, as with .to(torch.{dtype})")
    if tensor.strides:
        strides, step = tensor.strides[: tensor.rank], 1
        for size, stride in zip(reversed(shape), reversed(strides)):
            if size > 1 and stride != step:
                raise InputError(f"{name} is not contiguous", "give it with .contiguous()")
            step *= size
    return _Given(tensor.data + tensor.offset, shape)


@functools.cache
def _capsule_pointer():
    function = ctypes.pythonapi["PyCapsule_GetPointer"]
    function.argtypes, function.restype = (ctypes.py_object, ctypes.c_char_p), _POINTER
    return function
