"""Reads the manifest of a bundle, and checks that it says all that a loader asks it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from bertile.loading.errors import AGAIN, BundleError

SCHEMA = 1  # the newest manifest schema that this loader reads
LIBRARY, WEIGHTS, MANIFEST = "lib.so", "params.safetensors", "manifest.json"
CUDA = "cuda"  # the architecture of bundles for NVIDIA GPUs
# What a bundle cannot be without, beside the manifest.
PARTS = {CUDA: ("plan.json", "kernels.cubin", WEIGHTS)}


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
        raise BundleError(f"{path} is damaged: {error}", AGAIN) from error
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
        raise BundleError(f"{path} is damaged: {what}", AGAIN) from error
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
    for name in ("together", "padded"):
        if not isinstance(manifest["static"].get(name, False), bool):
            raise TypeError(f"'{name}' of 'static' is no truth value")
    for name in PARTS.get(target["arch"], (LIBRARY, WEIGHTS)):
        manifest["files"][name]
    for spec in manifest["files"].values():
        if not isinstance(spec["bytes"], int) or not isinstance(spec["sha256"], str):
            raise TypeError("'files' lacks sizes or hashes")
