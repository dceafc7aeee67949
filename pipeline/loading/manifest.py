"""Reads the manifest of a bundle, and checks that it says all that a loader asks it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from bertile.loading.blocks import BLOCK_TOKENS
from bertile.loading.errors import AGAIN, BundleError
from bertile.loading.inputs import FILL, PLACES

SCHEMA = 1  # the newest manifest schema that this loader reads
LIBRARY, WEIGHTS, MANIFEST = "lib.so", "params.safetensors", "manifest.json"
CUDA = "cuda"  # the architecture of bundles for NVIDIA GPUs
# What a bundle cannot be without, beside the manifest.
PARTS = {CUDA: ("plan.json", "kernels.cubin", WEIGHTS)}
SEAL = "sha256"  # the key of the manifest's own hash
UNSEALED = "0" * 64  # what stands in its place while it is computed
FLAGS = ("together", "padded")  # of 'static'
MOST_INPUTS, MOST_AXES, MOST_PARAMS = 16, 8, 1 << 14
MOST_TOKENS = 1 << 22  # of a static shape; its activations would take gigabytes
_INTEGERS = {"int32": 1 << 31, "int64": 1 << 63}
_RESULTS = {
    *("float16", "float32", "float64"),
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
}


def read_manifest(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the checked manifest of the bundle in `directory`; raises BundleError."""
    path = Path(directory) / MANIFEST
    try:
        data = path.read_bytes()
        manifest = json.loads(data.decode())
        json.dumps(manifest, ensure_ascii=False).encode()  # half a character can be nobody's name
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BundleError(f"{directory} is not a bundle: it has no {MANIFEST}") from error
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is damaged: {error}", AGAIN) from error
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if type(schema) is not int or schema < 1:
        raise BundleError(f"{path} is not the manifest of a bundle: it has no schema version")
    if schema > SCHEMA:
        raise BundleError(
            f"{directory} has schema {schema}, this loader reads up to {SCHEMA}",
            "update it with: pip install -U bertile",
        )
    try:
        if SEAL in manifest and not _is_sealed(data, manifest[SEAL]):
            raise BundleError(
                f"{path} has changed since it was compiled", "copy or compile the bundle again"
            )
        _check_manifest(manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise BundleError(f"{path} is damaged: {what}", AGAIN) from error
    return manifest


def _is_sealed(data: bytes, digest: str) -> bool:
    """Whether the hash is that of the file, with zeros where the hash itself stands last."""
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        return False
    before, _, after = data.rpartition(digest.encode())
    return hashlib.sha256(before + UNSEALED.encode() + after).hexdigest() == digest


def _check_manifest(manifest: dict) -> None:
    kinds = {
        "entry": str, "model": dict, "target": dict, "lanes": int, "inputs": list,
        "outputs": list, "static": dict, "params": list, "files": dict,
    }  # fmt: skip
    for key, kind in kinds.items():
        if not isinstance(manifest[key], kind):
            raise TypeError(f"'{key}' is no {kind.__name__}")
    if not isinstance(manifest.get("text", {}), dict):
        raise TypeError("'text' is no dict")
    if "exits" in manifest:
        _check_exits(manifest["exits"], len(manifest["params"]))
    target = manifest["target"]
    words = target["features"]
    if not isinstance(words, list) or not _are_texts([target["arch"], *words]):
        raise TypeError("'target' is not described as it should be")
    if manifest["lanes"] != BLOCK_TOKENS:
        raise ValueError(f"'lanes' is not {BLOCK_TOKENS}")
    _check_limits(manifest["model"], manifest["static"])
    for spec in manifest["inputs"]:
        _check_input(spec)
    for spec in manifest["outputs"]:
        _check_output(spec, manifest["static"].get("together", False))
    for key in ("inputs", "outputs"):
        _check_names(key, [spec["name"] for spec in manifest[key]], MOST_INPUTS)
        if not manifest[key]:
            raise ValueError(f"'{key}' is empty")
    _check_names("params", manifest["params"], MOST_PARAMS)
    for name in PARTS.get(target["arch"], (LIBRARY, WEIGHTS)):
        manifest["files"][name]
    for spec in manifest["files"].values():
        if type(spec["bytes"]) is not int or not isinstance(spec["sha256"], str):
            raise TypeError("'files' lacks sizes or hashes")


def _check_exits(exits: dict, params: int) -> None:
    """A number of layers and a function for each head, with places among the weights."""
    threshold, layers, stages = exits["threshold"], exits["layers"], exits["stages"]
    right = threshold is None or (type(threshold) in (int, float) and 0 <= threshold <= 1)
    if not right or len(layers) != len(stages) or not stages:
        raise TypeError("'exits' are not described as they should be")
    for count, stage in zip(layers, stages):
        places = stage["params"]
        counted = (count, stage["states"], *places)
        if not isinstance(stage["entry"], str) or not all(type(n) is int for n in counted):
            raise TypeError("a stage of 'exits' is not described as it should be")
        if min(counted) < 0 or max(places, default=0) >= params:
            raise ValueError("a stage of 'exits' has weights that there are not")


def _check_limits(model: dict, static: dict) -> None:
    batch, length = static.get("batch"), static.get("length")
    for limit in (model["max_length"], batch, length):
        if limit is not None and (type(limit) is not int or not 0 < limit < 1 << 31):
            raise TypeError("'max_length' or 'static' is no positive number")
    if (batch or 1) * (length or 1) > MOST_TOKENS:
        raise ValueError(f"'static' has more than {MOST_TOKENS} tokens")
    for name in FLAGS:
        if not isinstance(static.get(name, False), bool):
            raise TypeError(f"'{name}' of 'static' is no truth value")


def _check_input(spec: dict) -> None:
    below, default = spec["below"], spec["default"]
    most = _INTEGERS.get(str(spec["dtype"]))
    known = default is None or (isinstance(default, str) and default in (*FILL, PLACES))
    right = below is None or (type(below) is int and most is not None and 0 < below < most)
    if spec["name"] == "attention_mask":
        right = below == 2
    if not isinstance(spec["name"], str) or most is None or not known or not right:
        raise TypeError(f"the input {spec['name']} is not described as it should be")


def _check_output(spec: dict, together: bool) -> None:
    axes = spec["axes"]
    if (
        not isinstance(spec["name"], str)
        or str(spec["dtype"]) not in _RESULTS
        or not isinstance(axes, list)
        or len(axes) > MOST_AXES
        or not all(axis in ("batch", "length") or _is_size(axis) for axis in axes)
        or (axes.count("batch") > 1 and not together)
    ):
        raise TypeError(f"the output {spec['name']} is not described as it should be")


def _is_size(value: object) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _are_texts(values: list) -> bool:
    return all(isinstance(value, str) for value in values)


def _check_names(key: str, names: list, most: int) -> None:
    if not _are_texts(names):
        raise TypeError(f"'{key}' is no list of names")
    if len(set(names)) < len(names):
        raise ValueError(f"'{key}' names something twice")
    if len(names) > most:
        raise ValueError(f"'{key}' is too long")
