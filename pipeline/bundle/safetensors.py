"""Writes named arrays into a safetensors file in which every tensor is 64-byte aligned."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bertile.base.errors import BertileError
from bertile.loader import ALIGNMENT

_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",  # of the package ml_dtypes; numpy has none of its own
    "bool": "BOOL",
    **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
}


def write(path: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    """Write `tensors` to `path`: beside it first, then renamed. Raises BertileError naming `path`.

    Kernels read the mapped file in place and need every tensor on a multiple of 64 bytes. The
    format allows no holes, so behind a tensor of an odd size stands a tensor of padding bytes.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    header, pieces = _layout(tensors)
    try:
        with beside.open("wb") as file:
            file.write(header)
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise BertileError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()
    return path


def read(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, mapped into memory; padding is left out."""
    memory = np.memmap(path, dtype=np.uint8, mode="c")
    size = int(memory[:8].view("<u8")[0])
    header = json.loads(bytes(memory[8 : 8 + size]))
    dtypes = {name: dtype for dtype, name in _NAMES.items()}
    return {
        name: memory[8 + size + begin : 8 + size + end]
        .view(dtypes[entry["dtype"]])
        .reshape(entry["shape"])
        for name, entry in header.items()
        for begin, end in [entry.get("data_offsets", (0, 0))]
        if name != "__metadata__" and not name.lstrip("_").startswith("padding.")
    }


def dtype_name(tensor: np.ndarray) -> str:
    """What safetensors calls the dtype of an array."""
    return _NAMES[tensor.dtype.name]


def _layout(tensors: Mapping[str, np.ndarray]) -> tuple[bytes, list[memoryview]]:
    entries: dict[str, dict] = {}
    pieces: list[memoryview] = []
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype.name not in _NAMES or not tensor.dtype.isnative:
            raise BertileError(f"the tensor {name} has dtype {tensor.dtype}, which has no name")
        # (n, 1) bytes would lose the shape of a scalar; ascontiguousarray would make it (1,)
        data = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
        entries[name] = _entry(dtype_name(tensor), list(tensor.shape), end, data.nbytes)
        pieces.append(memoryview(data))
        end += data.nbytes
        gap = -end % ALIGNMENT
        if gap:
            entries[_free_name(f"padding.{end}", tensors)] = _entry("U8", [gap], end, gap)
            pieces.append(memoryview(bytes(gap)))
            end += gap
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, pieces


def _entry(dtype: str, shape: list[int], begin: int, size: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + size]}


def _free_name(name: str, taken: Mapping[str, np.ndarray]) -> str:
    while name in taken:
        name = f"_{name}"
    return name
