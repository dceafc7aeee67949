"""Gives the loader for GPUs in `bertile.loading.cuda` its public names.

A bundle has the same in one file, see `bertile.bundle.one_file`.
"""

from __future__ import annotations

from bertile.loading.blocks import BLOCK_TOKENS
from bertile.loading.cuda.code import CUBIN, PTX
from bertile.loading.cuda.device_array import CACHED, DeviceArray
from bertile.loading.cuda.driver import DRIVER, FUNCTIONS, KernelNode, MemcpyNode, open_driver
from bertile.loading.cuda.extents import Extent, evaluate
from bertile.loading.cuda.gpu import DriverError, Gpu, OutOfMemory
from bertile.loading.cuda.layout import ALIGNMENT, Layout, order, place_buffers
from bertile.loading.cuda.model import STREAMS, Model, load
from bertile.loading.cuda.plan import GRAPHS, PLAN, SCHEMA, Plan
from bertile.loading.cuda.request import PASS_BLOCKS
from bertile.loading.errors import AGAIN, BertileError, BundleError, InputError, PlatformError

__all__ = [
    "AGAIN",
    "ALIGNMENT",
    "BLOCK_TOKENS",
    "CACHED",
    "CUBIN",
    "DRIVER",
    "FUNCTIONS",
    "GRAPHS",
    "PASS_BLOCKS",
    "PLAN",
    "PTX",
    "SCHEMA",
    "STREAMS",
    "BertileError",
    "BundleError",
    "DeviceArray",
    "DriverError",
    "Extent",
    "Gpu",
    "InputError",
    "KernelNode",
    "Layout",
    "MemcpyNode",
    "Model",
    "OutOfMemory",
    "Plan",
    "PlatformError",
    "evaluate",
    "load",
    "open_driver",
    "order",
    "place_buffers",
]
