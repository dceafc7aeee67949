"""Opens the NVIDIA driver's library, and describes what of it is called."""

from __future__ import annotations

import ctypes

from bertile.loading.errors import PlatformError

DRIVER = "libcuda.so.1"
POINTER, SIZE, INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
UNSIGNED, ADDRESS, LONG = ctypes.c_uint, ctypes.c_uint64, ctypes.c_ulonglong


class KernelNode(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v1."""

    _fields_ = (
        ("function", POINTER),
        ("grid", UNSIGNED * 3),
        ("block", UNSIGNED * 3),
        ("shared", UNSIGNED),
        ("arguments", POINTER),  # void**
        ("extra", POINTER),
    )


class MemcpyNode(ctypes.Structure):
    """CUDA_MEMCPY3D_v2, of which a copy of bytes in one row uses a part."""

    _fields_ = (
        ("source_place", SIZE * 4),  # x in bytes, y, z, level
        ("source_kind", INT),  # 1 host, 2 device
        ("source_host", POINTER),
        ("source_device", ADDRESS),
        ("source_rest", SIZE * 4),  # array, reserved, pitch, height
        ("target_place", SIZE * 4),
        ("target_kind", INT),
        ("target_host", POINTER),
        ("target_device", ADDRESS),
        ("target_rest", SIZE * 4),
        ("bytes", SIZE),
        ("height", SIZE),
        ("depth", SIZE),
    )


# Every function of the driver that is called, with the types of its parameters: pointers to what
# is written and handles are POINTER, addresses on the device ADDRESS.
FUNCTIONS = {
    "cuInit": (UNSIGNED,),
    "cuDriverGetVersion": (POINTER,),
    "cuGetErrorName": (INT, POINTER),
    "cuGetErrorString": (INT, POINTER),
    "cuDeviceGetCount": (POINTER,),
    "cuDeviceGet": (POINTER, INT),
    "cuDeviceGetName": (POINTER, INT, INT),
    "cuDeviceGetAttribute": (POINTER, INT, INT),
    "cuDevicePrimaryCtxRetain": (POINTER, INT),
    "cuDevicePrimaryCtxRelease_v2": (INT,),
    "cuCtxPushCurrent_v2": (POINTER,),
    "cuCtxPopCurrent_v2": (POINTER,),
    "cuMemGetInfo_v2": (POINTER, POINTER),
    "cuMemAlloc_v2": (POINTER, SIZE),
    "cuMemFree_v2": (ADDRESS,),
    "cuMemHostAlloc": (POINTER, SIZE, UNSIGNED),
    "cuMemFreeHost": (POINTER,),
    "cuMemcpyHtoDAsync_v2": (ADDRESS, POINTER, SIZE, POINTER),
    "cuModuleLoadDataEx": (POINTER, POINTER, UNSIGNED, POINTER, POINTER),
    "cuModuleUnload": (POINTER,),
    "cuModuleGetFunction": (POINTER, POINTER, ctypes.c_char_p),
    "cuFuncSetAttribute": (POINTER, INT, INT),
    "cuStreamCreate": (POINTER, UNSIGNED),
    "cuStreamDestroy_v2": (POINTER,),
    "cuStreamSynchronize": (POINTER,),
    "cuStreamWaitEvent": (POINTER, POINTER, UNSIGNED),
    "cuEventCreate": (POINTER, UNSIGNED),
    "cuEventDestroy_v2": (POINTER,),
    "cuEventRecord": (POINTER, POINTER),
    "cuEventSynchronize": (POINTER,),
    "cuEventElapsedTime": (POINTER, POINTER, POINTER),
    "cuGraphCreate": (POINTER, UNSIGNED),
    "cuGraphDestroy": (POINTER,),
    "cuGraphAddKernelNode": (POINTER, POINTER, POINTER, SIZE, POINTER),
    "cuGraphAddMemcpyNode": (POINTER, POINTER, POINTER, SIZE, POINTER, POINTER),
    "cuGraphInstantiateWithFlags": (POINTER, POINTER, LONG),
    "cuGraphExecKernelNodeSetParams": (POINTER, POINTER, POINTER),
    "cuGraphExecDestroy": (POINTER,),
    "cuGraphLaunch": (POINTER, POINTER),
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
