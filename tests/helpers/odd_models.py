"""Saves models of odd sizes, and compares their bundles with torch however texts are padded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers import foreign_forms

import bertile
from bertile import backends
from bertile.backends.cpu import precision_plan
from bertile.base.quiet import quiet
from bertile.config import Config
from bertile.graph.graph import Graph
from bertile.loader import SIDES, Model
from bertile.lower import lowering
from bertile.onnx.samples import largest_difference
from bertile.targets.rows import resolve

LIMIT = 200  # positions
PADDINGS = ("right", "left", "holes")
SHAPES = ((1, 1), (3, 37), (2, 16), (1, LIMIT))
# What is left to TVM's kernels of a mask and the angles of places, once a request.
ONCE = {"astype", "expand_dims", "multiply", "strided_slice", "subtract"}


def saved(directory: Path, kind: str, config: str, sizes: dict[str, Any]) -> Any:
    """A model of transformers' classes `kind` and `config` with random weights, biases too, as
    save_pretrained writes it; and itself.
    """
    torch.manual_seed(0)
    with quiet():
        model = getattr(transformers, kind)(getattr(transformers, config)(**sizes)).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
        model.save_pretrained(directory)
    return model


def batch(
    rows: int, length: int, padding: str, first_is_real: bool = False, boxes: int = 0
) -> dict[str, np.ndarray]:
    """Ids and a mask with places that are masked, and rows without any; sides of boxes below
    `boxes`.

    Of a causal model the first place is to be real: without a key that it sees a token's vector
    means nothing. Of a head that reads the first token of DeBERTa too.
    """
    rng = np.random.default_rng(length)
    lengths = rng.integers(1, length + 1, rows)
    lengths[0] = length
    mask = np.arange(length) < lengths[:, None]
    if padding == "left":
        mask = mask[:, ::-1]
    elif padding == "holes":
        mask = rng.random((rows, length)) < 0.5
        mask[:, 0 if first_is_real else rng.integers(0, length)] = True
    ids = np.where(mask, rng.integers(3, 100, (rows, length)), 0)
    arrays = {"input_ids": ids, "attention_mask": mask.astype("int64")}
    if boxes:
        corners = np.sort(rng.integers(0, boxes, (rows, length, 2, 2)), axis=2)
        arrays["bbox"] = corners.reshape(rows, length, len(SIDES))
    return arrays


def answers(model: Any, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What transformers computes, by name."""
    with torch.no_grad():
        results = model(**{name: torch.from_numpy(array) for name, array in arrays.items()})
    return {name: value.numpy() for name, value in results.items() if torch.is_tensor(value)}


def compiled(tmp_path: Path, name: str = "model", **options: Any) -> Model:
    """The bundle of the model of that name in `tmp_path`; skips where the CPU has no bfloat16."""
    if options.get("precision") == "bf16" and not resolve().bf16:
        pytest.skip("this CPU does not multiply in bfloat16")
    config = Config(cache_dir=str(tmp_path / "cache"), **options)
    bertile.compile(str(tmp_path / name), tmp_path / "bundle", config)
    return bertile.load(tmp_path / "bundle")


def assert_equals_torch(
    bundle: Model,
    model: Any,
    shapes: Iterable[tuple[int, int]] = SHAPES,
    tolerance: float = 2e-5,
    paddings: Iterable[str] = PADDINGS,
    first_is_real: bool = False,
    boxes: int = 0,
) -> None:
    """All outputs at all real tokens, within `tolerance` of the largest value of each."""
    for rows, length in shapes:
        for padding in paddings:
            arrays = batch(rows, length, padding, first_is_real, boxes)
            want, got = answers(model, arrays), bundle(**arrays)
            for name, value in got.items():
                difference = largest_difference(value, want[name], arrays["attention_mask"])
                limit = tolerance * max(1, np.abs(want[name]).max())
                assert difference <= limit, (name, rows, length, padding)


def cosine_with_torch(bundle: Model, model: Any) -> float:
    """Between all vectors of tokens of one batch, as one vector.

    In float64: sums of so many numbers in float32 are off by more than what some tests ask for.
    """
    arrays = batch(3, 90, "right")
    real = arrays["attention_mask"] != 0
    got, want = (
        outputs["last_hidden_state"][real].astype("float64")
        for outputs in (bundle(**arrays), answers(model, arrays))
    )
    return float((got * want).sum() / np.linalg.norm(got) / np.linalg.norm(want))


def write_onnx(model: Any, path: Path, dynamo: bool, boxes: int = 0, **options: Any) -> None:
    """What torch's exporter, the newer or the older one, makes of a model's last hidden state."""

    class Positional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask, bbox=None):
            keywords = {"bbox": bbox} if boxes else {}
            outputs = model(
                input_ids=input_ids, attention_mask=attention_mask, **keywords, **options
            )
            return outputs.last_hidden_state

    arrays = batch(2, 24, "right", boxes=boxes)
    tensors = tuple(map(torch.from_numpy, arrays.values()))
    names, output = list(arrays), "last_hidden_state"
    settings: dict[str, Any] = {"input_names": names, "output_names": [output]}
    if dynamo:
        axes = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("seq", min=1, max=LIMIT)}
        settings |= {"dynamo": True, "external_data": False, "opset_version": 18, "verbose": False}
        settings["dynamic_shapes"] = tuple(dict(axes) for _ in names)
    else:
        settings |= {"dynamo": False, "opset_version": 17}
        settings["dynamic_axes"] = {tensor: {0: "b", 1: "s"} for tensor in (*names, output)}
    foreign_forms.run_quietly(Positional().eval(), tensors, path, settings)


def left_to_tvm(bundle: Model) -> set[str]:
    """The operators of a bundle that TVM's kernels compute."""
    return {entry.partition(" ")[0] for entry in bundle.manifest["fallthrough"]}


def shapes_of(bundle: Model, operation: str) -> list[dict[str, Any]]:
    """Of the kernels of one operation."""
    return [k["shape"] for k in bundle.manifest["kernels"] if k["operation"] == operation]


def planned(graph: Graph, row: Any, precision: str) -> list[Any]:
    """The tasks that a graph's layers become on a row of the targets."""
    graph = precision_plan.plan_layers(graph, precision, row, None, "off")
    return list(lowering.tasks(backends.of(row).forms(graph)))
