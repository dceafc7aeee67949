"""Changes bundles by a seed: their manifest, the header of their weights, any byte of any file."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from helpers import tiny_bundle

from bertile.bundle import safetensors, writer
from bertile.loading.interface import interface

INPUTS = {"input_ids": [[1, 2, 3], [4, 5, 0]], "attention_mask": [[1, 1, 1], [1, 1, 0]]}
VALUES = (
    *(0, 1, -1, 2, 3, 15, 17, 255, 65536, 1 << 20, (1 << 31) - 1, 1 << 31, 1 << 32, 1 << 61),
    *((1 << 62) + 1, (1 << 63) - 1, 1 << 63, 1 << 64, -(1 << 63), 10**400, 0.5, -0.0, 1e300),
    *(True, False, None, "", "batch", "length", "main", "../x", "/", "a\0b", "x" * 5000, "\ud800"),
    *([], {}, [[]], [1], {"name": 1}, ["batch"], "ones", "zeros", "int32", "float32", "F32"),
)
HEADER = 8  # bytes of the length of a safetensors header


def text() -> str:
    """What the library of the tiny bundle says of itself."""
    weights = [(k, safetensors.dtype_name(v), v.shape) for k, v in tiny_bundle.PARAMS.items()]
    return interface(tiny_bundle.MANIFEST, weights)


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The way to everything in a JSON value."""
    if path:
        yield path
    if isinstance(value, list):
        value = dict(enumerate(value))
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield from places(inner, (*path, key))


def at(value: Any, path: tuple) -> Any:
    for key in path:
        value = value[key]
    return value


def changed(value: Any, path: tuple, new: Any) -> Any:
    """A copy of a JSON value with another one in one place."""
    result = copy.deepcopy(value)
    at(result, path[:-1])[path[-1]] = new
    return result


def numbers(value: Any) -> list[tuple]:
    """The ways to all numbers of a JSON value."""
    return [path for path in places(value) if type(at(value, path)) is int]


def link(source: Path, target: Path) -> Path:
    """A bundle that shares the files of another; what is to be changed has to be written anew."""
    return Path(shutil.copytree(source, target, copy_function=os.link))


def replace(path: Path, data: bytes) -> None:
    path.unlink()  # of a shared file, only this name
    path.write_bytes(data)


def write_manifest(directory: Path, manifest: dict, sealed: bool = True) -> None:
    """Write the manifest with the hash of what it says, or with the one that stands in it."""
    (directory / "manifest.json").unlink()
    if sealed:
        writer.write_manifest(directory, manifest)
    else:
        (directory / "manifest.json").write_text(json.dumps(manifest))


def by_seed(source: Path, target: Path, seed: int) -> Path:
    """A copy of the bundle that differs in a way that the seed says."""
    rng = random.Random(seed)
    link(source, target)
    rng.choice((_manifest, _manifest, _manifest_bytes, _header, _header, _bytes))(target, rng)
    return target


def arrays_by_seed(path: Path, seed: int) -> Path:
    """A file of numpy's arrays that differs from a right one in a way that the seed says."""
    rng = random.Random(seed)
    save: Callable = rng.choice((np.savez, np.savez_compressed))
    save(path, **{name: np.array(value) for name, value in INPUTS.items()})
    path.write_bytes(_spoiled(path.read_bytes(), rng))
    return path


def _manifest(directory: Path, rng: random.Random) -> None:
    manifest = json.loads((directory / "manifest.json").read_text())
    for _ in range(rng.randint(1, 3)):
        manifest = _other(manifest, rng)
    kind = rng.randrange(5)
    if kind == 0:
        manifest.pop("sha256", None)
    try:
        write_manifest(directory, manifest, sealed=kind > 1)
    except UnicodeEncodeError:  # half a character can only be written as an escape
        (directory / "manifest.json").write_text(json.dumps(manifest))


def _other(value: Any, rng: random.Random) -> Any:
    result = copy.deepcopy(value)
    path = rng.choice(list(places(result)))
    parent, key = at(result, path[:-1]), path[-1]
    way = rng.randrange(6)
    if way == 0:
        del parent[key]
    elif way == 1 and isinstance(parent, list):
        parent.insert(rng.randint(0, len(parent)), copy.deepcopy(rng.choice(parent)))
    elif way == 2 and type(parent[key]) is int:
        parent[key] += rng.choice((-1, 1, 2, 1 << 32))
    elif way == 3:
        other = rng.choice(list(places(result)))
        parent[key] = copy.deepcopy(at(result, other))
    else:
        parent[key] = copy.deepcopy(rng.choice(VALUES))
    return result


def _manifest_bytes(directory: Path, rng: random.Random) -> None:
    path = directory / "manifest.json"
    replace(path, _spoiled(path.read_bytes(), rng))


def _header(directory: Path, rng: random.Random) -> None:
    """Change what the weights' file says of its tensors, and describe the file as it is then."""
    path = directory / "params.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:HEADER], "little")
    header = data[HEADER : HEADER + size]
    if rng.random() < 0.7:
        header = json.dumps(_other(json.loads(header), rng)).encode()
        header += b" " * (-(HEADER + len(header)) % 64)
    else:
        header = _spoiled(header, rng)
    length = len(header) if rng.random() < 0.9 else rng.choice((0, 1, len(data), 1 << 63))
    data = length.to_bytes(HEADER, "little") + header + data[HEADER + size :]
    replace(path, data)
    manifest = json.loads((directory / "manifest.json").read_text())
    digest = hashlib.sha256(data).hexdigest()
    manifest["files"][path.name] = {"bytes": len(data), "sha256": digest}
    write_manifest(directory, manifest)


def _bytes(directory: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(path for path in directory.iterdir() if path.is_file()))
    replace(path, _spoiled(path.read_bytes(), rng))


def _spoiled(data: bytes, rng: random.Random) -> bytes:
    result = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(result) + 1)
        way = rng.randrange(4)
        if way == 0:
            result[place : place + rng.randint(1, 8)] = b""
        elif way == 1:
            result[place:place] = rng.choice((b"0", b"9" * 30, b'"', b"{", b"[" * 300, b"\xff"))
        elif way == 2 and rng.random() < 0.3:
            del result[place:]
        elif place < len(result):
            result[place] = rng.randrange(256)
    return bytes(result)
