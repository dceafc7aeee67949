"""Gives the loader in `bertile.loading` its public names; `python -m bertile.loader` runs a bundle.

A bundle has the same in one file, see `bertile.bundle.one_file`.
"""

from __future__ import annotations

import sys

from bertile.loading.blocks import blocks_of, passes, sequence_ends, token_blocks
from bertile.loading.boxes import BOXES, SIDES
from bertile.loading.command import main
from bertile.loading.dispatch import load
from bertile.loading.errors import BertileError, BundleError, InputError, PlatformError
from bertile.loading.files import check_files
from bertile.loading.inputs import FILL, NEUTRAL, check_inputs, check_names, filled
from bertile.loading.manifest import (
    CUDA,
    LIBRARY,
    MANIFEST,
    PARTS,
    SCHEMA,
    WEIGHTS,
    read_manifest,
)
from bertile.loading.memory import ALIGNMENT
from bertile.loading.model import PASS_BLOCKS, Model
from bertile.loading.padding import cut
from bertile.loading.platform import check_platform, cpu_features
from bertile.loading.runtime import RUNTIME, find_runtime
from bertile.loading.threads import available_cores, set_thread_defaults, thread_count
from bertile.loading.tvm_abi import DLManagedTensor, DLTensor
from bertile.loading.weights import Place, map_tensors

__all__ = [
    "ALIGNMENT",
    "BOXES",
    "CUDA",
    "FILL",
    "LIBRARY",
    "MANIFEST",
    "NEUTRAL",
    "PARTS",
    "PASS_BLOCKS",
    "RUNTIME",
    "SCHEMA",
    "SIDES",
    "WEIGHTS",
    "BertileError",
    "BundleError",
    "DLManagedTensor",
    "DLTensor",
    "InputError",
    "Model",
    "Place",
    "PlatformError",
    "available_cores",
    "blocks_of",
    "check_files",
    "check_inputs",
    "check_names",
    "check_platform",
    "cpu_features",
    "cut",
    "filled",
    "find_runtime",
    "load",
    "main",
    "map_tensors",
    "passes",
    "read_manifest",
    "sequence_ends",
    "set_thread_defaults",
    "thread_count",
    "token_blocks",
]

if __name__ == "__main__":
    sys.exit(main())
