"""Writes models the way other exporters do: their attention, masks, positions and opsets."""

import io
import logging
import warnings
from contextlib import redirect_stderr, redirect_stdout

import torch
import transformers

from bertile.export import synthetic

TOLERANCE = 5e-5  # two layers in float32, scaled and summed in another order than the original's

INPUTS = ("input_ids", "attention_mask", "token_type_ids")

AUTO = {
    "encoder": "AutoModel",
    "sequence-classification": "AutoModelForSequenceClassification",
    "masked-lm": "AutoModelForMaskedLM",
}


class Positional(torch.nn.Module):
    """The plain forward of a transformers model, as other exporters trace it."""

    def __init__(self, model, names):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *arrays):
        outputs = self.model(**dict(zip(self.names, arrays)))
        return tuple(value for value in outputs.values() if value is not None)


def write(
    path,
    name="bert-tiny",
    head="encoder",
    attention="sdpa",
    dynamo=False,
    opset=14,
    dynamic=True,
    types=True,
    dtype=torch.int64,
    layers=2,
    change=lambda model: None,
):
    """Write the model, changed in place, as torch's TorchScript exporter does, and optimum after
    it, or dynamo.
    """
    sizes = synthetic.config(name)
    sizes.num_hidden_layers = layers
    model = synthetic.build(getattr(transformers, AUTO[head]), sizes)
    change(model)
    model.set_attn_implementation(attention)
    names = INPUTS[: 3 if types else 2]
    ids = torch.arange(32).reshape(2, 16) + 5
    mask = (torch.arange(16) < torch.tensor([[16], [9]])).to(torch.int64)
    arrays = tuple(array.to(dtype) for array in (ids, mask, ids % 2)[: len(names)])
    module = Positional(model, names).eval()
    with torch.no_grad():
        count = len(module(*arrays))
    outputs = ["last_hidden_state", "pooler_output"][:count] if head == "encoder" else ["logits"]
    options = {"input_names": list(names), "output_names": outputs, "opset_version": opset}
    if dynamo:
        axes = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("seq", min=1, max=512)}
        shapes = (tuple(dict(axes) for _ in names),) if dynamic else None
        options |= {"dynamo": True, "external_data": False, "dynamic_shapes": shapes}
        options |= {"verbose": False}
    else:
        options |= {"dynamo": False}
        if dynamic:
            axes = {0: "batch_size", 1: "sequence_length"}
            options["dynamic_axes"] = {tensor: axes for tensor in (*names, *outputs)}
            for output in ("pooler_output", *(["logits"] if "sequence" in head else [])):
                options["dynamic_axes"][output] = {0: "batch_size"}
    run_quietly(module, arrays, path, options)
    return path


def run_quietly(module, arrays, path, options):
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            with redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")
                torch.onnx.export(module, arrays, str(path), **options)
    finally:
        logging.disable(logging.NOTSET)


def operators(model):
    return [node.op_type for node in model.graph.node]


class OneAttention(torch.nn.Module):
    """One self-attention whose mask is applied by `masked`(scores, attention_mask)."""

    def __init__(self, masked):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.masked = torch.nn.Embedding(50, 16), masked
        self.query, self.key = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

    def forward(self, input_ids, attention_mask):
        hidden = self.words(input_ids)
        batch, length = input_ids.shape
        query, key = (
            linear(hidden).view(batch, length, 2, 8).transpose(1, 2)
            for linear in (self.query, self.key)
        )
        scores = torch.matmul(query / 8**0.5, key.transpose(2, 3))
        weights = torch.softmax(self.masked(scores, attention_mask), dim=-1)
        value = hidden.view(batch, length, 2, 8).transpose(1, 2)
        return torch.matmul(weights, value).transpose(1, 2).reshape(batch, length, 16)


def write_attention(path, masked):
    arrays = (torch.ones(2, 6, dtype=torch.int64),) * 2
    axes = {0: "b", 1: "s"}
    names = ["input_ids", "attention_mask"]
    options = {"dynamo": False, "opset_version": 14, "input_names": names}
    options |= {
        "output_names": ["hidden"],
        "dynamic_axes": {tensor: axes for tensor in (*names, "hidden")},
    }
    run_quietly(OneAttention(masked), arrays, path, options)
    return path


def prefixed(scores, mask):
    """Half of the real tokens are seen by all: no table of places says that."""
    places, half = torch.arange(mask.shape[1]), mask.sum(1)[:, None, None, None] // 2
    seen = (places[None, :] <= places[:, None]) | (places < half)
    return torch.where(seen & (mask[:, None, None, :] > 0), scores, torch.tensor(-1e9))
