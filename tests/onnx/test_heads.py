"""Poolings and heads inside an ONNX file: each computes what ONNX Runtime does, with any padding.

All heads of a group are outputs of one file, so that it is compiled once.
"""

import onnx
import pytest
import torch
from helpers import spelled_encoder as spelled
from helpers.tokens_beside_padding import assert_equal, compiled
from torch import nn

from bertile.base.errors import ModelError
from bertile.config import Config
from bertile.onnx import normalizer

HIDDEN = spelled.HIDDEN
torch.manual_seed(5)
DENSE = nn.Linear(HIDDEN, 12).requires_grad_(False)
QUERIES = nn.Linear(HIDDEN, 3).requires_grad_(False)
FILTERS = nn.Conv1d(HIDDEN, 8, 3, padding=1).requires_grad_(False)


def mean(h, k):
    return (h * k[..., None]).sum(1) / k.sum(1, keepdim=True).clamp(min=1e-9)


def filled(h, k, number):
    return h.masked_fill(k[..., None] == 0, number)


def last(k):
    return k.sum(1).long() - 1


def rows(h):
    return torch.arange(h.shape[0])


def places(h):
    return torch.arange(h.shape[1])


# Functions of tokens h (B, S, C) and the mask k (B, S) as float32.
PLAIN = {
    "mean": mean,
    "first": lambda h, k: h[:, 0],
    "largest": lambda h, k: filled(h, k, -1e9).max(1).values,
    "largest_inf": lambda h, k: filled(h, k, float("-inf")).max(1).values,
    "smallest": lambda h, k: filled(h, k, 1e9).min(1).values,
    "sum_by_root": lambda h, k: (h * k[..., None]).sum(1) / k.sum(1, keepdim=True).sqrt(),
}
COUNTED = {
    "weighted": lambda h, k: mean(h, k * (places(h) + 1)[None]),
    "weighted_by_count": lambda h, k: mean(h, k.cumsum(1) * k),
    "last_gathered": lambda h, k: h[rows(h), last(k)],
    "last_by_elements": lambda h, k: h.gather(1, last(k)[:, None, None].expand(-1, 1, HIDDEN))[
        :, 0
    ],
    "last_of_all_rows": lambda h, k: h.reshape(-1, HIDDEN).index_select(
        0, rows(h) * h.shape[1] + last(k)
    ),
    "last_hot": lambda h, k: (h * (places(h)[None] == last(k)[:, None])[..., None].float()).sum(1),
    "last_flipped": lambda h, k: h[rows(h), h.shape[1] - 1 - k.flip(1).long().argmax(1)],
}
COMPUTED = {
    "dense_tanh": lambda h, k: nn.functional.normalize(torch.tanh(DENSE(mean(h, k))), dim=1),
    "several": lambda h, k: torch.cat([h[:, 0], mean(h, k), filled(h, k, -1e9).max(1).values], 1),
    "normed": lambda h, k: nn.functional.layer_norm(mean(h, k), (HIDDEN,)),
    "attended": lambda h, k: (filled(QUERIES(h), k, -1e9).softmax(1).transpose(1, 2) @ h).flatten(
        1
    ),
    "deviation": lambda h, k: (mean(h * h, k) - mean(h, k) ** 2).clamp(min=1e-6).sqrt(),
    "log_sum": lambda h, k: torch.logsumexp(filled(h, k, -1e9), 1),
}
OF_ALL_POSITIONS = {
    "mean_of_all": lambda h, k: h.mean(1),
    "largest_of_all": lambda h, k: h.max(1).values,
    "reversed_weights": lambda h, k: mean(h, k * (h.shape[1] - places(h))[None].float()),
    "by_root_of_length": lambda h, k: mean(h, k) / torch.tensor(h.shape[1]).float().sqrt(),
    "last_position": lambda h, k: h[:, -1],
    "inner": lambda h, k: (h * k[..., None])[:, 1:].sum(1),
    "two_ends": lambda h, k: (h * k[..., None])[:, -2:].sum(1),
    "filtered": lambda h, k: FILTERS((h * k[..., None]).transpose(1, 2)).relu().max(2).values,
}


class Headed(nn.Module):
    def __init__(self, heads):
        super().__init__()
        self.encoder, self.heads = spelled.Encoder(layers=1), heads

    def forward(self, ids, mask, types):
        hidden = self.encoder(ids, mask, types)
        return tuple(head(hidden, mask.float()) for head in self.heads.values())


class Watched(spelled.Encoder):
    """Gives the hidden states and the attention of each layer besides."""

    def forward(self, ids, mask, types):
        self.seen = []
        last = super().forward(ids, mask, types)
        return last, *self.seen

    def attend(self, layer, x, added, batch, length):
        q, k, v = (self.heads(x, *part, batch, length) for part in layer.qkv)
        weights = (q @ k.transpose(-1, -2) / spelled.SIZE**0.5 + added).softmax(-1)
        self.seen += [x, weights]
        return self.joined(weights @ v, batch, length)


def write(path, heads):
    axes = {name: {0: "batch"} for name in heads}
    return spelled.write(path, Headed(heads), opset=17, outputs=tuple(heads), axes=axes)


GROUPS = {
    "few": ({name: COUNTED[name] for name in ("weighted", "last_by_elements")}, False),
    "counted": (COUNTED, False),
    "plain": (PLAIN, False),
    "computed": (COMPUTED, False),
    "of all positions": (OF_ALL_POSITIONS, True),
}


@pytest.mark.parametrize(
    ("heads", "padded"),
    [
        pytest.param(*group, marks=[pytest.mark.slow] if name != "few" else [], id=name)
        for name, group in GROUPS.items()
    ],
)
def test_every_head_computes_the_same(heads, padded, tmp_path, cache):
    path = write(tmp_path / "m.onnx", heads)
    model = compiled(path, tmp_path, cache)
    said = [note for note in model.manifest["notes"] if "depends on padding" in note]
    assert bool(said) == padded
    assert_equal(model, path)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("int8", marks=pytest.mark.slow)])
def test_attention_and_hidden_states_may_be_outputs(precision, tmp_path, cache):
    names = ("last_hidden_state", "hidden_0", "attention_0", "hidden_1", "attention_1")
    axes = {name: {0: "batch", 2: "length", 3: "length"} for name in names if "att" in name}
    path = spelled.write(tmp_path / "m.onnx", Watched(), outputs=names, axes=axes)
    model = compiled(path, tmp_path, cache, precision=precision)
    assert "attention" in {kernel["operation"] for kernel in model.manifest["kernels"]}
    assert_equal(model, path, tolerance=2e-5 if precision == "fp32" else 0.3)


def test_a_head_of_an_unknown_operator_is_refused_by_name(tmp_path):
    layer = nn.LSTM(HIDDEN, 4, batch_first=True).requires_grad_(False)
    path = write(tmp_path / "m.onnx", {"recurrent": lambda h, k: layer(h)[0][:, -1]})
    with pytest.raises(ModelError, match=r"operator LSTM \(node '.*LSTM'\) cannot be imported"):
        normalizer.normalize(path, tmp_path / "out", Config())


def test_tokens_of_all_rows_in_one_axis_are_refused(tmp_path):
    path = write(tmp_path / "m.onnx", {"flat": lambda h, k: h[k > 0]})
    with pytest.raises(ModelError, match="neither the batch nor the length"):
        normalizer.normalize(path, tmp_path / "out", Config())


def test_no_shape_is_read_as_a_value(tmp_path):
    path = write(tmp_path / "m.onnx", {"weighted": COUNTED["weighted"]})
    exported = normalizer.normalize(path, tmp_path / "out", Config())
    nodes = onnx.load(exported.onnx_path).graph.node
    shapes = {name for node in nodes if node.op_type == "Shape" for name in node.output}
    readers = [node for node in nodes if shapes & set(node.input)]
    assert {node.op_type for node in readers} == {"Slice"}
