"""Finds what can run a bundle for a GPU on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bertile import cuda_loader, loader
from bertile.base.errors import PlatformError
from bertile.run.cuda import emulated_model, emulator
from bertile.targets import detect

LIMIT = 25_000_000  # weights of layers: with these, a request of 64 tokens takes the emulator 10 s
Model = cuda_loader.Model | emulated_model.Model


def open_model(directory: Path) -> Model | str:
    """The bundle on the GPU that is here, else, where it is small, its kernels emulated; or why
    neither can be.
    """
    card = detect.gpu()
    reason = card if isinstance(card, str) else ""
    if not reason:
        try:
            return loader.load(directory, verify=False)
        except PlatformError as error:  # the card is of another kind than the bundle's
            reason = error.what
    if lacks := emulator.missing():
        return f"{reason}, and {lacks} to emulate one"
    if multiplied(loader.read_manifest(directory)) > LIMIT:
        return f"{reason}, and the model is too large for the emulator"
    return emulated_model.Model(directory)


def emulates(model: Any) -> bool:
    """Whether a model is run without a GPU."""
    return isinstance(model, emulated_model.Model)


def multiplied(manifest: dict[str, Any]) -> int:
    """The weights of all linear layers, as often as they are called."""
    shapes = [(kernel["shape"], kernel["calls"]) for kernel in manifest["kernels"]]
    sizes = [np.prod([s.get("inputs", 0), s.get("outputs", 0), n]) for s, n in shapes]
    return int(sum(sizes))
