"""Lets a model round as it was trained to: reads what `bertile compress` wrote beside it.

A model that learned the ranges of its layers' inputs says so in REPORT. The export makes each a
pair of QuantizeLinear and DequantizeLinear, which the passes read as those of any quantized file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bertile.base.errors import ModelError, require
from bertile.schedules.reference import LEVELS

REPORT = "compression.json"
Ends = tuple[float, float]


def read(directory: Path) -> dict[str, Ends]:
    """The ends of each layer's input by the layer's name; {} where none were learned.

    Raises ModelError for a report that cannot be read.
    """
    path = directory / REPORT
    if not path.is_file():
        return {}
    try:
        ranges = json.loads(path.read_text(encoding="utf-8")).get("ranges") or {}
        return {str(name): (float(low), float(high)) for name, (low, high) in ranges.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"'{path}' does not describe a compression: {error}") from error


def fix(model: Any, ranges: Mapping[str, Ends], source: str) -> tuple[str, ...]:
    """Let the layers of a torch model round their inputs to these ranges; notes for people.

    Of a model that is compiled with another head, the ranges of its own are left out. Raises
    ModelError for a layer that the encoder has not.
    """
    if not ranges:
        return ()
    # the second registers the operators that ONNX has, with shapes that are not fixed
    torch, _ = require("export", "torch", "torch.ao.quantization.fx._decomposed")
    decomposed = torch.ops.quantized_decomposed
    modules, prefix = dict(model.named_modules()), f"{model.base_model_prefix}."
    inner = dict(model.base_model.named_modules())
    for name, (low, high) in ranges.items():
        layer = modules.get(name) or inner.get(name.removeprefix(prefix))
        if layer is None and not name.startswith(prefix) and inner is not modules:
            continue
        if layer is None or not low <= 0 <= high or low == high:
            raise ModelError(
                f"'{source}' has a range for '{name}', which its model has not",
                f"remove {REPORT}, or train the model again",
            )
        scale = (high - low) / LEVELS
        zero = round(-low / scale)

        def rounded(_: Any, arguments: Any, scale: float = scale, zero: int = zero) -> Any:
            form = (scale, zero, 0, LEVELS, torch.uint8)
            integers = decomposed.quantize_per_tensor(arguments[0], *form)
            return (decomposed.dequantize_per_tensor(integers, *form), *arguments[1:])

        layer.register_forward_pre_hook(rounded)
    return (f"ranges of the inputs of {len(ranges)} layers were learned in training",)
