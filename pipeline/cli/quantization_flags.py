"""Lists the flags of Config that say how a model is quantized, in the order of its fields."""

from __future__ import annotations

from typing import Any

QUANTIZATION_FLAGS: tuple[tuple[str, str, Any, str], ...] = (
    ("--calibrate", "FILE", str, "int8: observe inputs on these: .txt, a text a line, or .npz"),
    ("--ranges", "dynamic|minmax|percentile|mse", str, "int8: per token, or fixed by --calibrate"),
    ("--smooth", "0..1", float, "int8: share of outliers to move from inputs to weights"),
    ("--max-drop", "X", float, "int8: keep layers in higher precision until --eval drops less"),
    ("--eval", "FILE", str, "what --max-drop measures: labelled .tsv/.jsonl, or sentences .txt"),
)
