"""Runs every launch of a GPU bundle's plan on the CPU, with every access to memory checked.

It is for small models: a kernel takes thousands of times as long as on a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bertile import loader
from bertile.bundle import safetensors
from bertile.cuda_loader import BLOCK_TOKENS, PLAN, evaluate
from bertile.run.cuda import emulator

SOURCE = "kernels.cu"  # the kernels of a bundle as text, in the words of prelude.cuh
_SCALARS = {"int32": np.int32, "int64": np.int64, "float32": np.float32}


class Model:
    """As ``cuda_loader.Model``, for one request at a time."""

    def __init__(self, directory: Path) -> None:
        self.manifest = loader.read_manifest(directory)
        self.plan = json.loads((directory / PLAN).read_text(encoding="utf-8"))
        stored = safetensors.read(directory / loader.WEIGHTS)
        self.weights = [_copied(stored[name]) for name in self.plan["weights"]]
        folder = emulator.kept()
        folder.mkdir(parents=True, exist_ok=True)
        source = (directory / SOURCE).read_text(encoding="utf-8")
        self.kernels = emulator.Emulated(emulator.build(source, folder))

    def __call__(self, /, **inputs: Any) -> dict[str, np.ndarray]:
        specs = self.manifest["inputs"]
        checked = loader.check_inputs(inputs, specs, self.manifest["model"]["max_length"])
        shape = next(iter(checked.values())).shape
        arrays = [
            checked.get(spec["name"], np.broadcast_to(loader.filled(spec["default"], shape), shape))
            for spec in specs
        ]
        mask = checked.get("attention_mask", np.ones(shape, np.int64))
        arrays.append(loader.token_blocks(mask, BLOCK_TOKENS))
        symbols = dict(zip(("batch", "length", "blocks"), (*shape, len(arrays[-1]))))
        known = {
            "input": [
                _copied(array.astype(spec["dtype"]))
                for array, spec in zip(arrays, self.plan["inputs"])
            ],
            "weight": self.weights,
            "buffer": [_unwritten(evaluate(b["bytes"], symbols)) for b in self.plan["buffers"]],
        }
        for step in self.plan["steps"]:
            if evaluate(step.get("when", 1), symbols) > 0:
                self._launch(step, known, symbols)
        return {spec["name"]: self._result(spec, known, symbols) for spec in self.plan["outputs"]}

    def _launch(
        self, step: Mapping[str, Any], known: Mapping[str, Any], symbols: Mapping[str, int]
    ) -> None:
        arguments = [
            known[kind][value] if kind in known else _SCALARS[kind](evaluate(value, symbols))
            for kind, value in step["arguments"]
        ]
        grid = [evaluate(extent, symbols) for extent in step["grid"]]
        self.kernels.launch(step["entry"], grid, step["threads"], step["shared"], arguments)

    def _result(
        self, spec: Mapping[str, Any], known: Mapping[str, Any], symbols: Mapping[str, int]
    ) -> np.ndarray:
        extents = [evaluate(extent, symbols) for extent in spec["shape"]]
        return known["buffer"][spec["buffer"]].view(spec["dtype"]).reshape(extents)


def _copied(array: np.ndarray) -> np.ndarray:
    """The same values where kernels may read them: from a multiple of 16 bytes."""
    place = emulator.aligned(array.nbytes, np.uint8)
    place[...] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return place


def _unwritten(size: int) -> np.ndarray:
    """Memory that holds NaN, as what no kernel has written yet."""
    place = emulator.aligned(size, np.uint8)
    place.fill(0xFF)
    return place
