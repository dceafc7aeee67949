"""Brings the weights and the kernels of a bundle to the GPU, which all workspaces share there."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bertile.loading.cuda.driver import INT, POINTER
from bertile.loading.cuda.gpu import NO_TIMING, OWN_STREAM, DriverError, Gpu, host_memory
from bertile.loading.cuda.plan import PLAN, Plan
from bertile.loading.errors import AGAIN, BundleError, PlatformError
from bertile.loading.interface import check_interface, interface
from bertile.loading.manifest import WEIGHTS
from bertile.loading.weights import check_ids, described, map_tensors

CUBIN, PTX = "kernels.cubin", "kernels.ptx"
_UNUSABLE_CODE = {200, 209, 218, 221, 222, 223, 300}  # images of code that this driver cannot take
_DYNAMIC_SHARED = 8  # CUfunction_attribute: the most dynamic shared memory of a launch
_CHUNK = 8 << 20  # bytes of pinned memory that the weights go through, twice


class Code:
    """What all workspaces share on the device: the weights, and the kernels by their entries."""

    def __init__(self, gpu: Gpu, manifest: dict, plan: Plan, files: Mapping[str, Path]):
        self._gpu, self._module, self._base = gpu, None, None
        self.functions: dict[str, int] = {}
        try:
            data, places = map_tensors(files[WEIGHTS], plan.weights)
            if plan.weights != manifest["params"]:
                raise BundleError("the plan's weights are not those of the manifest", AGAIN)
            check_ids(manifest, places)
            weights = described(plan.weights, places)
            check_interface(plan.interface, interface(manifest, weights), files[PLAN])
            self._base = gpu.allocate(len(data), "the weights")
            _bring_up(gpu, files[WEIGHTS], self._base, len(data))
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
        stream = gpu.handle("cuStreamCreate", OWN_STREAM)
        events += [gpu.handle("cuEventCreate", NO_TIMING) for _ in range(2)]
        with path.open("rb", buffering=0) as file:
            for turn, at in enumerate(range(0, size, chunk)):
                half, length = turn % 2, min(chunk, size - at)
                if turn > 1:
                    gpu.call("cuEventSynchronize", events[half])
                _read(file, host_memory(pinned + half * chunk, length))
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


def _load_module(gpu: Gpu, manifest: dict, files: Mapping[str, Path]) -> int:
    """The bundle's code for this card: its cubin, or its PTX, which the driver compiles."""
    target = manifest["target"]
    matches = [re.fullmatch(r"sm_(\d+)(\d)a?", feature) for feature in target["features"]]
    if not (matches := [match for match in matches if match]):
        raise BundleError("the manifest's 'target' names no compute capability", AGAIN)
    row, card = tuple(map(int, matches[0].groups())), gpu.capability
    if row[0] == card[0] and row[1] <= card[1]:
        return _link(gpu, files[CUBIN])
    level = _ptx_level(files[PTX]) if PTX in files else None
    if level is None or level > card:
        wanted, have = (f"{major}.{minor}" for major, minor in (row, card))
        raise PlatformError(
            f"the bundle is for GPUs of compute capability {wanted}, {gpu.name} has {have}",
            f"compile the model with --target cuda-sm{card[0]}{card[1]}",
        )
    return _link(gpu, files[PTX])


def _ptx_level(path: Path) -> tuple[int, int] | None:
    """The oldest compute capability that PTX may be compiled for; None where it is for one only."""
    with path.open("rb") as file:
        match = re.search(
            rb"^\s*\.target\s+sm_(\d+)(\d)([af]?)\b", file.read(1 << 16), re.MULTILINE
        )
    return (int(match[1]), int(match[2])) if match and not match[3] else None


def _link(gpu: Gpu, path: Path) -> int:
    """Load cubin, or PTX; raises PlatformError with what the driver's compiler says."""
    image, log = path.read_bytes() + b"\0", ctypes.create_string_buffer(4096)
    options = (INT * 2)(5, 6)  # CU_JIT_ERROR_LOG_BUFFER, CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES
    values = (POINTER * 2)(ctypes.addressof(log), len(log))
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
