"""A bundle directory comes in, a callable from token ids to numpy arrays goes out.

One file on numpy, ctypes and the standard library, over the C ABI of libtvm_ffi: it is
`bertile.loader`, and copied into a bundle it is the `loader.py` that runs there alone.
"""

from __future__ import annotations

import ctypes
import difflib
import hashlib
import json
import math
import os
import platform
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import NamedTuple

try:
    import numpy as np
except ImportError:  # `python loader.py` on a bare machine gets a sentence, not a traceback
    if __name__ != "__main__":
        raise
    print("loader.py: the package numpy is missing; install it with: pip install numpy")
    sys.exit(3)

SCHEMA = 1  # the newest manifest schema that this loader reads
ALIGNMENT = 64  # bytes; kernels load whole cache lines, so every tensor must start on one
LIBRARY, WEIGHTS, MANIFEST = "lib.so", "params.safetensors", "manifest.json"
CUDA = "cuda"  # the architecture of bundles for NVIDIA GPUs
# What a bundle cannot be without, beside the manifest.
PARTS = {CUDA: ("plan.json", "kernels.cubin", WEIGHTS)}
# Of a pass through the model, for each thread; a longer batch takes several. More activations fall
# out of the caches between two kernels: 8 texts of 128 tokens take up to a fifth longer at once.
PASS_BLOCKS = 8
RUNTIME = ("libtvm_ffi.so", "libtvm_runtime.so")  # in the order in which they are loaded


# -- errors ------------------------------------------------------------------------------------


class BertileError(Exception):
    """What happened and, where there is one, the remedy; printed as one sentence."""

    exit_code = 1

    def __init__(self, what: str, remedy: str = ""):
        super().__init__(what, remedy)
        self.what, self.remedy = what, remedy

    def __str__(self) -> str:
        return f"{self.what}; {self.remedy}" if self.remedy else self.what


class BundleError(BertileError):
    """A bundle that is missing, damaged, changed or of an unknown schema."""


class InputError(BertileError):
    """Ids, masks or options that the model cannot take."""

    exit_code = 2


class PlatformError(BertileError):
    """This machine lacks an architecture, a CPU feature or a library that the bundle needs."""

    exit_code = 3


# -- public ------------------------------------------------------------------------------------


def load(
    directory: str | os.PathLike,
    threads: int | None = None,
    *,
    verify: bool = True,
    device: int = 0,
) -> Model:
    """Load the bundle in `directory`; one for a GPU gives a `cuda_loader.Model`.

    `threads` is how many cores one call may use (default: every core this process may run on), or
    `device` the number of the GPU; `verify` compares the hash of every file with the manifest.
    Raises BundleError for a damaged bundle, PlatformError for one that this machine cannot run,
    InputError for a wrong `threads` or `device`.
    """
    root = Path(directory)
    manifest = read_manifest(root)
    if manifest["target"]["arch"] == CUDA:
        return _cuda_loader().load(root, device, verify=verify)
    check_platform(manifest["target"])
    count = thread_count(threads)
    files = check_files(root, manifest["files"], verify)
    runtime = _open_runtime(root, manifest["files"])
    params = _read_tensors(runtime, files[WEIGHTS], manifest["params"])
    return Model(runtime, manifest, files[LIBRARY], params, count)


def _cuda_loader():
    """The module that lies beside this one, and shares this one's functions and errors."""
    if __package__:
        return import_module(f"{__package__}.cuda_loader")
    if "cuda_loader" not in sys.modules:
        sys.modules.setdefault("loader", sys.modules[__name__])  # `python loader.py` is __main__
        path = Path(__file__).with_name("cuda_loader.py")
        if not path.is_file():
            raise PlatformError(
                f"the bundle is for a GPU, and {path} is missing", "copy it beside loader.py"
            )
        spec = spec_from_file_location("cuda_loader", path)
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules["cuda_loader"] = module
    return sys.modules["cuda_loader"]


class Model:
    """A loaded bundle. Any number of threads may call one; it answers them one after the other."""

    def __init__(
        self, runtime: _Runtime, manifest: dict, library: Path, params: list[_Object], threads: int
    ):
        self.manifest = manifest
        self.inputs = tuple(spec["name"] for spec in manifest["inputs"])
        self.outputs = tuple(spec["name"] for spec in manifest["outputs"])
        self.max_length: int | None = manifest["model"]["max_length"]
        self.threads = threads
        self._runtime, self._lock = runtime, threading.Lock()
        try:
            self._entry, self._held = _open_library(runtime, library, manifest["entry"])
        except BertileError as error:
            raise BundleError(f"cannot load {library}: {error.what}") from error
        self._params = params
        self._arguments = runtime.pack([0] * (len(self.inputs) + 1) + params)
        self._shapes: set[tuple[int, ...]] = set()

    def __call__(self, **inputs) -> dict[str, np.ndarray]:
        """Run the model on arrays or nested lists of integers, each (batch, length).

        A missing attention_mask is all ones and missing token_type_ids are all zeros. Positions
        behind the last token of a sequence are zero in the outputs. Raises InputError for a wrong
        name, rank, type or shape, for ids that the model does not have and for too many tokens.
        """
        specs, static = self.manifest["inputs"], self.manifest["static"]
        given = check_inputs(inputs, specs, self.max_length)
        batch, length = next(iter(given.values())).shape
        step, width = static.get("batch"), static.get("length") or length
        if length > width or (length < width and "attention_mask" not in self.inputs):
            exactly = "at most" if length > width else "exactly"
            raise InputError(f"the input has {length} tokens, this bundle takes {exactly} {width}")
        mask = given.get("attention_mask")
        ends = np.full(batch, length) if mask is None else sequence_ends(mask)
        values = [given.get(spec["name"], FILL.get(spec["default"])) for spec in specs]
        lanes = self.manifest["lanes"]
        pieces = []
        for first, count in passes(ends, lanes, PASS_BLOCKS * self.threads, step):
            room = (step or count, width)
            arrays = [
                _fit(value, first, (count, length), room, spec["dtype"])
                for value, spec in zip(values, specs)
            ]
            last = np.ones(room[0], np.int64)
            last[:count] = ends[first : first + count]
            pieces.append(self._run(arrays, blocks_of(last, lanes)))
        return {
            spec["name"]: cut(spec["axes"], [piece[index] for piece in pieces], length, ends)
            for index, spec in enumerate(self.manifest["outputs"])
        }

    def close(self) -> None:
        """Give back the library and the weights; a later call raises BertileError."""
        with self._lock:
            self._entry, self._held, self._params, self._arguments = None, (), [], None

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _run(self, arrays: list[np.ndarray], blocks: np.ndarray) -> list[np.ndarray]:
        """Call the compiled function: aligned (batch, length) inputs and the table of blocks.

        A caller that packs sequences of unequal lengths builds its own table (see token_blocks).
        """

        def call() -> list[np.ndarray]:
            with self._lock:
                if self._entry is None:
                    raise BertileError("the model is closed", "load the bundle again")
                self._limit_pool(arrays[0].shape, blocks.shape)
                tensors = [self._runtime.tensor(array) for array in (*arrays, table)]
                for slot, tensor in zip(self._arguments, tensors):
                    _fill(slot, tensor)
                result = self._runtime.call_packed(self._entry, self._arguments)
                return self._runtime.arrays(result, len(self.outputs))

        table = _aligned(blocks, "int32")
        return _on_pool(self._runtime, self.threads, call)

    def _limit_pool(self, *shapes: tuple[int, ...]) -> None:
        # TVM's allocator keeps every freed buffer for the next request of exactly its size: without
        # a limit, a server that sees every batch and length would keep all activations of each.
        key = tuple(size for shape in shapes for size in shape)
        if key not in self._shapes:
            if len(self._shapes) >= 16:
                self._shapes.clear()
                self._runtime.call(self._runtime.function("vm.builtin.memory_manager.clear"))
            self._shapes.add(key)


def passes(ends: np.ndarray, lanes: int, limit: int, step: int | None) -> list[tuple[int, int]]:
    """Cut a batch into (first row, rows): `step` rows each, or at most `limit` blocks."""
    if step:
        return [(first, min(step, len(ends) - first)) for first in range(0, len(ends), step)]
    starts, room = [], 0
    for row, blocks in enumerate(((ends + (lanes - 1)) // lanes).tolist()):
        if not starts or blocks > room:
            starts.append(row)
            room = limit
        room -= blocks
    return [(first, end - first) for first, end in zip(starts, [*starts[1:], len(ends)])]


def sequence_ends(attention_mask: np.ndarray) -> np.ndarray:
    """Return for each row the position behind its last non-zero entry, at least 1, as (batch,)."""
    used = np.asarray(attention_mask) != 0
    length = used.shape[1]
    return np.where(used.any(axis=1), length - used[:, ::-1].argmax(axis=1), 1)


def token_blocks(attention_mask: np.ndarray, lanes: int) -> np.ndarray:
    """Return the table (m, 4) int32 of the blocks of `lanes` tokens for a (batch, length) mask.

    A line is [row of the batch, position of the block's first token, index of the first block of
    its sequence, number of blocks of its sequence]. What is behind the last token needs no block.
    """
    return blocks_of(sequence_ends(attention_mask), lanes)


def blocks_of(ends: np.ndarray, lanes: int) -> np.ndarray:
    """Return the table of `token_blocks` for sequences that end before the positions `ends`."""
    counts = (ends + (lanes - 1)) // lanes
    sequences = np.empty((len(ends), 4), np.int32)
    sequences[:, 0] = np.arange(len(ends))
    sequences[:, 2] = np.cumsum(counts) - counts
    sequences[:, 3] = counts
    table = np.repeat(sequences, counts, axis=0)
    table[:, 1] = (np.arange(len(table)) - table[:, 2]) * lanes
    return table


# -- inputs and outputs ------------------------------------------------------------------------

FILL = {"ones": 1, "zeros": 0}


def check_inputs(inputs: dict, specs: list[dict], max_length: int | None) -> dict:
    """Return the given inputs as integer arrays of one shape (batch, length), checked."""
    known = {spec["name"]: spec for spec in specs}
    given = {name: _integers(name, one) for name, one in check_names(inputs, specs).items()}
    first, shape = next((name, array.shape) for name, array in given.items())
    if 0 in shape:
        raise InputError(f"{first} has shape {shape}", "give at least one row and one token")
    for name, array in given.items():
        if array.shape != shape:
            raise InputError(f"{name} has shape {array.shape}, but {first} has {shape}")
    if max_length is not None and shape[1] > max_length:
        raise InputError(
            f"the input has {shape[1]} tokens, the model takes at most {max_length}",
            "shorten or split the text",
        )
    for name, array in given.items():
        _check_range(name, array, known[name])
    return given


def check_names(inputs: dict, specs: list[dict]) -> dict:
    """Return the inputs that are not None; raises InputError for a wrong or missing name."""
    known = [spec["name"] for spec in specs]
    for name in inputs:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            question = f"did you mean '{near[0]}'? " if near else ""
            raise InputError(
                f"the model has no input '{name}'", f"{question}known: {', '.join(known)}"
            )
    given = {name: value for name, value in inputs.items() if value is not None}
    for spec in specs:
        if spec["name"] not in given and spec["default"] not in FILL:
            raise InputError(f"the input {spec['name']} is missing")
    if not given:
        raise InputError("no input was given", f"known: {', '.join(known)}")
    return given


def _integers(name: str, value) -> np.ndarray:
    try:
        array = np.asarray(value)
    except ValueError as error:  # rows of unequal length
        raise InputError(
            f"{name} is not rectangular", "pad every row to one length, with attention_mask 0"
        ) from error
    if array.ndim != 2:
        raise InputError(
            f"{name} has {array.ndim} dimension{'s' * (array.ndim != 1)}",
            "give (batch, length), for one text [ids]",
        )
    if array.dtype == object and array.size:  # numpy older than 1.24 makes this of ragged lists
        raise InputError(f"{name} holds values that are no integers of 64 bits")
    if array.dtype.kind not in "iub" and array.size:
        raise InputError(f"{name} has dtype {array.dtype}", "give integers")
    return array


def _check_range(name: str, array: np.ndarray, spec: dict) -> None:
    below = spec["below"]
    limit = np.iinfo(spec["dtype"]).max if below is None else below - 1
    if array.dtype == bool:
        array = array.view(np.uint8)
    low, high = int(array.min()), int(array.max())
    if low >= 0 and high <= limit:
        return
    wrong = low if low < 0 else high
    row, column = np.argwhere(array == wrong)[0]
    raise InputError(f"{name}[{row}, {column}] is {wrong}, the model takes 0 to {limit}")


def cut(axes: list, pieces: list[np.ndarray], length: int, ends: np.ndarray) -> np.ndarray:
    """Join the chunks of one output, cut the padding off and zero what no block has computed."""
    sizes = {"batch": len(ends), "length": length}
    array = pieces[0]
    if len(pieces) > 1 and "batch" in axes:
        array = np.concatenate(pieces, axis=axes.index("batch"))
    wanted = tuple(sizes.get(axis, size) for axis, size in zip(axes, array.shape))
    if array.shape != wanted:
        array = array[tuple(slice(size) for size in wanted)].copy()
    if axes[:2] == ["batch", "length"]:
        for row in np.flatnonzero(ends < length):
            array[row, ends[row] :] = 0
    return array


def _fit(value, first: int, shape: tuple, room: tuple, dtype: str) -> np.ndarray:
    """Return `shape` of an array from its row `first` on, or a number, padded with 0 to `room`."""
    if not isinstance(value, int):
        value = value[first : first + shape[0]]
        if shape == room:
            return _aligned(value, dtype)
    out = _empty(room, dtype)
    if shape != room:
        out.fill(0)
    out[: shape[0], : shape[1]] = value
    return out


def _empty(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -_address(raw) % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


_BYTE = ctypes.c_char


def _address(array: np.ndarray) -> int:
    try:  # four times as fast as array.ctypes.data
        return ctypes.addressof(_BYTE.from_buffer(array))
    except (TypeError, ValueError):  # read-only, or empty
        return array.ctypes.data


def _aligned(array: np.ndarray, dtype: str) -> np.ndarray:
    fits = array.dtype == dtype and array.flags.c_contiguous
    if fits and _address(array) % ALIGNMENT == 0:
        return array
    out = _empty(array.shape, dtype)
    out[...] = array
    return out


# -- the bundle's files ------------------------------------------------------------------------


def read_manifest(directory: str | os.PathLike) -> dict:
    """Return the checked manifest of the bundle in `directory`; raises BundleError."""
    path = Path(directory) / MANIFEST
    try:
        manifest = json.loads(path.read_bytes().decode())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BundleError(f"{directory} is not a bundle: it has no {MANIFEST}") from error
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is damaged: {error}", "compile the bundle again") from error
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if not isinstance(schema, int):
        raise BundleError(f"{path} is not the manifest of a bundle: it has no schema version")
    if schema > SCHEMA:
        raise BundleError(
            f"{directory} has schema {schema}, this loader reads up to {SCHEMA}",
            "update it with: pip install -U bertile",
        )
    try:
        _check_manifest(manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise BundleError(f"{path} is damaged: {what}", "compile the bundle again") from error
    return manifest


def _check_manifest(manifest: dict) -> None:
    kinds = {
        "entry": str, "model": dict, "target": dict, "lanes": int, "inputs": list,
        "outputs": list, "static": dict, "params": list, "files": dict,
    }  # fmt: skip
    for key, kind in kinds.items():
        if not isinstance(manifest[key], kind):
            raise TypeError(f"'{key}' is no {kind.__name__}")
    for spec in manifest["inputs"]:
        np.iinfo(spec["dtype"])
        if not isinstance(spec["name"], str) or not isinstance(spec["below"], (int, type(None))):
            raise TypeError(f"the input {spec['name']} is not described as it should be")
        spec["default"]
    for spec in manifest["outputs"]:
        np.dtype(spec["dtype"])
        if not isinstance(spec["name"], str) or not isinstance(spec["axes"], list):
            raise TypeError(f"the output {spec['name']} is not described as it should be")
    target = manifest["target"]
    if not all(isinstance(word, str) for word in (target["arch"], *target["features"])):
        raise TypeError("'target' is not described as it should be")
    if not manifest["inputs"] or not manifest["outputs"] or manifest["lanes"] < 1:
        raise ValueError("'inputs', 'outputs' or 'lanes' is empty")
    limits = (manifest["model"]["max_length"], *map(manifest["static"].get, ("batch", "length")))
    if not all(limit is None or (isinstance(limit, int) and limit > 0) for limit in limits):
        raise TypeError("'max_length' or 'static' is no positive number")
    for name in PARTS.get(target["arch"], (LIBRARY, WEIGHTS)):
        manifest["files"][name]
    for spec in manifest["files"].values():
        if not isinstance(spec["bytes"], int) or not isinstance(spec["sha256"], str):
            raise TypeError("'files' lacks sizes or hashes")


def check_platform(target: dict) -> None:
    """Raise PlatformError unless this machine has the architecture and CPU features of `target`.

    Done before the library is opened, so that an illegal instruction is never reached.
    """
    names = {"amd64": "x86_64", "arm64": "aarch64"}
    here = names.get(platform.machine().lower(), platform.machine())
    if target["arch"] != here:
        raise PlatformError(
            f"the bundle is for {target['arch']}, this machine is {here}",
            "compile the model for this machine",
        )
    missing = sorted(set(target["features"]) - cpu_features())
    if missing:
        raise PlatformError(
            f"this CPU lacks {', '.join(missing)}, which the bundle needs "
            f"(target {target.get('name')})",
            "compile the model with a --target that fits this CPU",
        )


_FLAGS = ("flags", "Features")  # what x86 and what ARM call the line in /proc/cpuinfo


def cpu_features() -> set[str]:
    """Return the features of this CPU in the spelling of /proc/cpuinfo; empty where it has none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    found = (line.partition(":") for line in lines)
    return next((set(rest.split()) for key, _, rest in found if key.strip() in _FLAGS), set())


def check_files(root: Path, files: dict, verify: bool) -> dict[str, Path]:
    """Return the path of every file of the manifest: all inside the bundle, all unchanged."""
    paths = {name: _inside(root, name) for name in files}
    for name, path in paths.items():
        if not path.is_file():
            raise BundleError(f"{root / name} is missing", "copy or compile the bundle again")
        size, expected = path.stat().st_size, files[name]["bytes"]
        if size != expected:
            raise BundleError(
                f"{root / name} has {size} bytes, not {expected}",
                "it is truncated or changed: copy or compile the bundle again",
            )
    if verify:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            hashes = dict(zip(paths, pool.map(_sha256, paths.values())))
        for name, found in hashes.items():
            if found != files[name]["sha256"]:
                raise BundleError(
                    f"{root / name} has changed since it was compiled",
                    "copy or compile the bundle again",
                )
    return paths


def _inside(root: Path, name: str) -> Path:
    top = os.path.realpath(root)
    path = os.path.realpath(os.path.join(top, name.replace("\0", "..")))  # no path may hold a NUL
    if os.path.isabs(name) or ".." in Path(name).parts or not path.startswith(top + os.sep):
        raise BundleError(f"the manifest of {root} names '{name}', which is outside the bundle")
    return Path(path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        if path.stat().st_size:
            digest.update(np.memmap(path, np.uint8, "r"))  # outside the GIL, without a copy
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()


_DTYPES = {  # safetensors' name → DLPack's type code, bits
    "F64": (2, 64), "F32": (2, 32), "F16": (2, 16), "BF16": (4, 16), "BOOL": (6, 8),
    "I64": (0, 64), "I32": (0, 32), "I16": (0, 16), "I8": (0, 8),
    "U64": (1, 64), "U32": (1, 32), "U16": (1, 16), "U8": (1, 8),
}  # fmt: skip


class Place(NamedTuple):
    """Where a tensor lies in the bytes of a safetensors file; its type as DLPack has it."""

    begin: int
    end: int
    shape: list[int]
    code: int
    bits: int


def _read_tensors(runtime: _Runtime, path: Path, names: list[str]) -> list[_Object]:
    """Return the named tensors of a safetensors file, in place: mapped, shared, never copied."""
    data, places = map_tensors(path, names)
    return [
        runtime.tensor_at(data[place.begin : place.end], place.shape, place.code, place.bits)
        for place in places
    ]


def map_tensors(path: Path, names: list[str]) -> tuple[np.ndarray, list[Place]]:
    """Return the bytes of a safetensors file, mapped, and where the named tensors lie in them."""
    try:
        data = np.memmap(path, np.uint8, "r")
        size = int.from_bytes(data[:8].tobytes(), "little")
        if len(data) < 8 or size > len(data) - 8:
            raise ValueError("its header is longer than the file")
        header, start = json.loads(data[8 : 8 + size].tobytes()), 8 + size
        if not isinstance(header, dict):
            raise ValueError("its header is no object")
        return data, [_place(len(data), start, header[name]) for name in names]
    except KeyError as error:
        raise BundleError(f"{path} is damaged: it lacks {error}") from error
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise BundleError(f"{path} is damaged: {error}", "compile the bundle again") from error


def _place(size: int, start: int, entry: dict) -> Place:
    (code, bits), shape = _DTYPES[entry["dtype"]], [int(size) for size in entry["shape"]]
    begin, end = (start + offset for offset in entry["data_offsets"])
    if min(shape, default=0) < 0:
        raise ValueError("a tensor has a negative size")
    if not start <= begin <= end <= size or (end - begin) * 8 != math.prod(shape) * bits:
        raise ValueError("a tensor reaches beyond its bytes")
    if begin % ALIGNMENT:
        raise ValueError(f"a tensor does not start on a multiple of {ALIGNMENT} bytes")
    return Place(begin, end, shape, code, bits)


# -- threads -----------------------------------------------------------------------------------


def set_thread_defaults() -> None:
    """Set, before TVM's thread pool starts, what the user has not: no pinning, a short spin.

    TVM pins its workers, and the calling thread, to the first cores of the machine; two processes
    would share those and leave the others idle. It spins 300,000 rounds after each kernel, which
    on a shared machine takes the core from whoever has work.
    """
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "2000")


def available_cores() -> int:
    """Return how many cores this process may use: its affinity, and the quota of its cgroup."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:
        cores = os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(cores, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup, or "max": no quota
        return cores


def thread_count(threads: int | None) -> int:
    """Return `threads` if this process may use so many cores, else raise InputError.

    None is every core it may use, or as many as TVM_NUM_THREADS says.
    """
    available, wish = available_cores(), os.environ.get("TVM_NUM_THREADS")
    if threads is None:
        if wish is not None and not wish.isdecimal():
            raise InputError(f"TVM_NUM_THREADS is '{wish}'", "set it to a number, or not at all")
        return max(1, min(available, int(wish or available)))
    if isinstance(threads, bool) or not isinstance(threads, (int, np.integer)) or threads < 1:
        raise InputError(f"threads is {threads!r}", "give a whole number from 1")
    if threads > available:
        raise InputError(f"threads is {threads}, but this process may use {available} cores")
    return int(threads)


_here = threading.local()  # of each thread: the pool it has, and the threads that stand in for it


def _on_pool(runtime: _Runtime, threads: int, work):
    """Call `work` where TVM's pool has `threads` threads: here, or else in a thread of our own.

    TVM has one pool for each calling thread. One that exists cannot grow, and after a fork its
    workers are gone; a new thread gets a new pool.
    """
    if getattr(_here, "process", None) not in (None, os.getpid()):
        return _stand_in(threads).submit(_on_pool, runtime, threads, work).result()
    if getattr(_here, "threads", None) != threads:
        runtime.resize_pool(threads)
        _here.process, _here.threads = os.getpid(), threads
        _here.enough = runtime.call(runtime.function("runtime.NumThreads")) >= threads
    if _here.enough or getattr(_here, "stands_in", False):
        return work()
    return _stand_in(threads).submit(_on_pool, runtime, threads, work).result()


def _stand_in(threads: int) -> ThreadPoolExecutor:
    made = _here.__dict__.setdefault("made", {})
    key = (os.getpid(), threads)
    if key not in made:
        made[key] = ThreadPoolExecutor(1, initializer=setattr, initargs=(_here, "stands_in", True))
    return made[key]


# -- TVM's C ABI -------------------------------------------------------------------------------

_NONE, _INT, _BOOL, _RAW_STR, _OBJECT = 0, 1, 2, 8, 64  # TVMFFITypeIndex; objects are from 64 on
_TENSOR, _HEADER = 70, 24  # bytes of TVMFFIObject, before the object's own fields


class _Bytes(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("size", ctypes.c_size_t))


class _Value(ctypes.Union):
    _fields_ = (
        ("integer", ctypes.c_int64),
        ("pointer", ctypes.c_void_p),
        ("text", ctypes.c_char_p),
    )


class _Any(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int32), ("zero", ctypes.c_uint32), ("value", _Value))


class DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("offset", ctypes.c_uint64),
    )


class DLManagedTensor(ctypes.Structure):
    _fields_ = (("tensor", DLTensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class _Object:
    """One reference to an object of TVM, given back when Python drops it."""

    __slots__ = ("_release", "handle", "keep", "kind")

    def __init__(self, kind: int, handle: int, release, keep=None):
        self.kind, self.handle, self.keep, self._release = kind, handle, keep, release

    def __del__(self):
        self._release(self.handle)


class _Runtime:
    """The two runtime libraries of one process: functions, calls, tensors and errors."""

    def __init__(self, *paths: str):
        set_thread_defaults()
        try:
            ffi, _ = (ctypes.CDLL(path, ctypes.RTLD_GLOBAL) for path in paths)
        except OSError as error:
            raise PlatformError(f"cannot load the TVM runtime: {error}") from error
        pointer, integer = ctypes.c_void_p, ctypes.c_int32
        self._call = _prototype(ffi.TVMFFIFunctionCall, pointer, pointer, integer, pointer)
        self._global = _prototype(ffi.TVMFFIFunctionGetGlobal, pointer, pointer)
        self._from_dlpack = _prototype(
            ffi.TVMFFITensorFromDLPack, pointer, integer, integer, pointer
        )
        self._raised = _prototype(ffi.TVMFFIErrorMoveFromRaised, pointer)
        self._release = _prototype(ffi.TVMFFIObjectDecRef, pointer)
        self._functions: dict[str, _Object] = {}

    def function(self, name: str) -> _Object:
        """Return the global function `name`."""
        if name not in self._functions:
            text, handle = name.encode(), ctypes.c_void_p()
            data = ctypes.cast(ctypes.c_char_p(text), ctypes.c_void_p)
            self._check(self._global(ctypes.byref(_Bytes(data, len(text))), ctypes.byref(handle)))
            if not handle.value:
                raise PlatformError(f"the TVM runtime has no function {name}")
            self._functions[name] = _Object(0, handle.value, self._release)
        return self._functions[name]

    def call(self, function: _Object, *arguments):
        """Call with integers, bytes and objects; return None, an integer or an _Object."""
        return self.call_packed(function, self.pack(arguments))

    @staticmethod
    def pack(arguments) -> ctypes.Array:
        """Lay arguments out as the C ABI wants them; they must live as long as the result."""
        packed = (_Any * len(arguments))()
        for index, argument in enumerate(arguments):
            _fill(packed[index], argument)
        return packed

    def call_packed(self, function: _Object, packed: ctypes.Array):
        """Call with what `pack` has made; the result is as that of `call`."""
        result = _Any()
        self._check(self._call(function.handle, packed, len(packed), ctypes.byref(result)))
        if result.kind >= _OBJECT:
            return _Object(result.kind, result.value.pointer, self._release)
        return None if result.kind == _NONE else result.value.integer

    def tensor(self, array: np.ndarray) -> _Object:
        """Return a tensor on the memory of an aligned, contiguous integer array."""
        code = {"i": 0, "u": 1}[array.dtype.kind]
        return self.tensor_at(array, array.shape, code, array.itemsize * 8)

    def tensor_at(self, memory: np.ndarray, shape, code: int, bits: int) -> _Object:
        """Return a tensor on `memory`, which is kept as long as the tensor."""
        sizes = (ctypes.c_int64 * len(shape))(*shape)
        cpu, device, lanes = 1, 0, 1
        inner = DLTensor(_address(memory), cpu, device, len(shape), code, bits, lanes, sizes)
        managed, handle = DLManagedTensor(inner), ctypes.c_void_p()
        made = self._from_dlpack(ctypes.byref(managed), ALIGNMENT, 1, ctypes.byref(handle))
        self._check(made)
        return _Object(_TENSOR, handle.value, self._release, (memory, sizes, managed))

    def arrays(self, result: _Object, count: int) -> list[np.ndarray]:
        """Copy the first `count` tensors of a TVM array into new numpy arrays."""
        item = self.function("ffi.ArrayGetItem")
        return [_copy(self.call(item, result, index)) for index in range(count)]

    def resize_pool(self, threads: int) -> None:
        """Give the calling thread a pool of `threads` threads, or shrink the one it has."""
        try:
            cores = sorted(os.sched_getaffinity(0))[:threads]
        except AttributeError:
            cores = list(range(threads))
        names = [str(core).encode() for core in cores]
        listed = self.call(self.function("ffi.Array"), *names)
        # -3: the pool has as many threads as the list is long, and they may share those cores
        self.call(self.function("runtime.config_threadpool"), -3, threads, listed)

    def _check(self, code: int) -> None:
        if not code:
            return
        handle = ctypes.c_void_p()
        self._raised(ctypes.byref(handle))
        message = "no reason given"
        if handle.value:
            error = _Object(0, handle.value, self._release)
            text = _Bytes.from_address(error.handle + _HEADER + ctypes.sizeof(_Bytes))
            message = ctypes.string_at(text.data, text.size).decode(errors="replace").strip()
        raise BertileError(f"TVM reports: {' '.join(message.split())[:500]}")


def _fill(slot: _Any, argument) -> None:
    if isinstance(argument, _Object):
        slot.kind, slot.value.pointer = argument.kind, argument.handle
    elif isinstance(argument, bytes):
        slot.kind, slot.value.text = _RAW_STR, argument
    else:
        slot.kind = _BOOL if isinstance(argument, bool) else _INT
        slot.value.integer = argument


def _prototype(function, *types):
    function.argtypes, function.restype = types, ctypes.c_int
    return function


def _copy(tensor: _Object) -> np.ndarray:
    source = DLTensor.from_address(tensor.handle + _HEADER)
    kind = {0: "i", 1: "u", 2: "f"}[source.code]
    out = np.empty(tuple(source.shape[: source.rank]), f"{kind}{source.bits // 8}")
    ctypes.memmove(_address(out), source.data + source.offset, out.nbytes)
    return out


def _open_library(runtime: _Runtime, path: Path, entry: str) -> tuple[_Object, tuple]:
    find = runtime.function("ffi.ModuleGetFunction")
    module = runtime.call(runtime.function("ffi.ModuleLoadFromFile"), os.fsencode(path))
    start = runtime.call(find, module, b"vm_load_executable", False)
    if start is None:
        raise BertileError("it holds no compiled model")
    machine = runtime.call(start)
    cpu, device, pooled = 1, 0, 2
    runtime.call(runtime.call(find, machine, b"vm_initialization", False), cpu, device, pooled)
    function = runtime.call(find, machine, entry.encode(), False)
    if function is None:
        raise BertileError(f"it has no function '{entry}'")
    return function, (machine, module)


_process: dict[str, _Runtime] = {}
_process_lock = threading.Lock()


def _open_runtime(root: Path, files: dict) -> _Runtime:
    """Return the runtime of this process, opened once: a second copy would end the process."""
    with _process_lock:
        if "runtime" not in _process:
            hashes = [files.get(f"runtime/{name}", {}).get("sha256") for name in RUNTIME]
            own = [str(root / "runtime" / name) for name in RUNTIME] if all(hashes) else None
            try:
                # with the same version installed, `import tvm` must find these already loaded
                shared = find_runtime()
                if own and shared[0] not in _mapped_libraries().values():
                    shared = shared if [_sha256(Path(path)) for path in shared] == hashes else own
            except PlatformError:
                if not own:
                    raise
                shared = own
            _process["runtime"] = _Runtime(*shared)
        return _process["runtime"]


def find_runtime() -> tuple[str, str]:
    """Return the paths of libtvm_ffi and libtvm_runtime, without importing what they belong to.

    What the process has loaded already comes first, then the packages apache-tvm-ffi and
    apache-tvm. Raises PlatformError where one of the two is missing.
    """
    loaded = _mapped_libraries()
    pairs = zip(("tvm_ffi", "tvm"), RUNTIME)
    paths = [loaded.get(name) or _package_library(package, name) for package, name in pairs]
    if not paths[0] or not paths[1]:
        raise PlatformError(
            "the TVM runtime libraries are missing",
            "install them with: pip install apache-tvm, or compile with --runtime include",
        )
    return paths[0], paths[1]


def _mapped_libraries() -> dict[str, str]:
    try:
        lines = Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return {}
    paths = {line.split(None, 5)[-1] for line in lines if line.endswith(RUNTIME)}
    return {os.path.basename(path): path for path in paths if os.path.basename(path) in RUNTIME}


def _package_library(package: str, library: str) -> str | None:
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None:
        return None
    path = os.path.join(os.path.dirname(spec.origin), "lib", library)
    return path if os.path.isfile(path) else None


# -- python loader.py --------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Load the bundle that this file lies in, run a small batch and print what came out."""
    import argparse

    parser = argparse.ArgumentParser(prog="loader.py", description=main.__doc__)
    parser.add_argument("bundle", nargs="?", default=os.path.dirname(os.path.abspath(__file__)))
    parser.add_argument("--ids", help="token ids to run, with commas between: 101,7592,102")
    parser.add_argument("--threads", type=int, help="cores to use (default: all)")
    parser.add_argument("--device", type=int, default=0, help="number of the GPU (default: 0)")
    options = parser.parse_args(arguments)
    try:
        began = time.perf_counter()
        with load(options.bundle, options.threads, device=options.device) as model:
            _print_model(model, time.perf_counter() - began)
            _print_run(model, _example(model) if options.ids is None else _parse(options.ids))
    except BertileError as error:
        print(f"loader.py: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _print_model(model: Model, seconds: float) -> None:
    source, target = model.manifest["model"], model.manifest["target"]
    features = " ".join(target["features"])
    limit = f", at most {model.max_length} tokens" if model.max_length else ""
    print(f"model    {source.get('source')} ({source.get('family')}, {source.get('head')}{limit})")
    print(f"target   {target.get('name')} ({target['arch']} {features})")
    place = model.gpu.name if target["arch"] == CUDA else f"{model.threads} threads"
    print(f"loaded   in {seconds * 1e3:.0f} ms, {place}")


def _print_run(model: Model, ids: list[list[int]]) -> None:
    inputs = {"input_ids": ids}
    model(**inputs)  # the first call starts the threads
    began = time.perf_counter()
    outputs = model(**inputs)
    seconds = time.perf_counter() - began
    for name in model.inputs:
        print(f"input    {name} {np.shape(ids)}")
    for name, array in outputs.items():
        first = ", ".join(f"{value:.4f}" for value in array.reshape(-1)[:4])
        print(f"output   {name} {array.shape}: {first}{', …' if array.size > 4 else ''}")
        if not np.isfinite(array).all():
            raise BertileError(f"the output {name} is not finite")
    print(f"ran      in {seconds * 1e3:.2f} ms")
    if model.manifest["target"]["arch"] == CUDA:
        alone, copied = (np.median(model.time(copies=copies, **inputs)) for copies in (False, True))
        print(f"on GPU   in {alone:.3f} ms, with copies in {copied:.3f} ms (medians of 100)")


def _parse(text: str) -> list[list[int]]:
    try:
        return [[int(part) for part in text.split(",")]]
    except ValueError as error:
        raise InputError(f"'{text}' is no list of ids", "write them as 101,7592,102") from error


def _example(model: Model) -> list[list[int]]:
    below = next((s["below"] for s in model.manifest["inputs"] if s["name"] == "input_ids"), None)
    length = model.manifest["static"].get("length") or min(8, model.max_length or 8)
    return [[token % (below or 100) for token in range(row, row + length)] for row in (1, 2)]


if __name__ == "__main__":
    sys.exit(main())
