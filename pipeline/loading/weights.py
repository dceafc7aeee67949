"""Maps the weights of a bundle into memory, and finds each tensor in them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bertile.loading.errors import AGAIN, BundleError
from bertile.loading.manifest import MOST_AXES
from bertile.loading.memory import ALIGNMENT

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
    dtype: str  # as safetensors has it


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
        raise BundleError(f"{path} is damaged: {error}", AGAIN) from error


def _place(size: int, start: int, entry: dict) -> Place:
    (code, bits), shape, offsets = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(shape) > MOST_AXES:
        raise ValueError("a tensor has no shape or no place")
    if not all(type(number) is int and 0 <= number < 1 << 62 for number in (*shape, *offsets)):
        raise ValueError("a tensor has a size or a place that is no size")
    begin, end = (start + offset for offset in offsets)
    if not start <= begin <= end <= size or (end - begin) * 8 != math.prod(shape) * bits:
        raise ValueError("a tensor reaches beyond its bytes")
    if begin % ALIGNMENT:
        raise ValueError(f"a tensor does not start on a multiple of {ALIGNMENT} bytes")
    return Place(begin, end, shape, code, bits, entry["dtype"])


def described(names: list[str], places: list[Place]) -> list[tuple[str, str, list[int]]]:
    """Return tensors as `interface` takes them."""
    return [(name, place.dtype, place.shape) for name, place in zip(names, places)]


def check_ids(manifest: dict, places: list[Place]) -> None:
    """Raise BundleError for an input that takes ids of which no tensor has so many."""
    most = max((size for place in places for size in place.shape), default=0)
    for spec in manifest["inputs"]:
        if spec["name"] != "attention_mask" and (spec["below"] or 0) > most:
            what = f"{spec['name']} has {spec['below']} ids, and no weight has so many rows"
            raise BundleError(f"the manifest is damaged: {what}", AGAIN)
