"""Which weights go: the smallest blocks, exactly as many as asked for, and nothing else."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from helpers import family_models
from helpers.family_models import EVERY, NAMES
from transformers.pytorch_utils import Conv1D

from bertile.base.errors import UsageError
from bertile.export import checkpoints, pruning
from bertile.families.table import named
from bertile.numerics.zeros import BLOCKS, analyse

# Of these Q, K and V of each head lie together.
TOGETHER = [family for family in NAMES if named(family).by_head]


def normal(*shape):
    return np.random.default_rng(5).standard_normal(shape).astype("float32")


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.9, 0.97])
@pytest.mark.parametrize("pattern", ["unstructured", *BLOCKS])
def test_smallest_blocks_go_and_the_count_is_exact(pattern, sparsity):
    w = normal(96, 64)
    mask = pruning.kept(w, sparsity, pattern)
    inputs, outputs = BLOCKS.get(pattern, (1, 1))
    blocks = np.abs(w).reshape(96 // inputs, inputs, 64 // outputs, outputs).sum((1, 3))
    stays = mask[::inputs, ::outputs]
    assert np.array_equal(mask, np.kron(stays, np.ones((inputs, outputs), bool)))
    assert np.count_nonzero(~stays) == round(sparsity * blocks.size)
    assert blocks[stays].min() > blocks[~stays].max()
    assert analyse(w * mask).pattern == pattern


def test_two_largest_of_four_inputs_stay():
    w = normal(96, 64)
    stays = pruning.kept(w, 0.5, "2:4")
    groups, kept = (array.reshape(24, 4, 64) for array in (np.abs(w), stays))
    assert (kept.sum(1) == 2).all()
    assert (np.where(kept, groups, np.inf).min(1) > np.where(kept, 0, groups).max(1)).all()
    assert analyse(w * stays).pattern == "2:4"


def test_something_always_stays():
    assert pruning.largest(np.array([3.0, 1.0, 2.0]), 0.99).tolist() == [True, False, False]
    assert pruning.largest(np.array([3.0, 1.0, 2.0]), 0.01).all()
    assert pruning.largest(np.array([1.0]), 0.9).all()


def pruned(family, sparsity, pattern):
    """A tiny model before and after: its parameters by name, and what is said of its layers."""
    model = checkpoints.load(f"synthetic:{family}-tiny").model
    before = {name: value.detach().clone() for name, value in parameters(model).items()}
    rows = pruning.prune(model, family, sparsity, pattern)
    return before, parameters(model), rows


def parameters(model):
    """The parameters by name; weights of linear layers are (outputs, inputs)."""
    turned = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, Conv1D)}
    return {n: value.T if n in turned else value for n, value in model.named_parameters()}


def grouped(family, rows):
    """Of each encoder layer what is said of the layers of each group."""
    row = named(family)
    for start in range(0, len(rows), len(row.layers)):
        yield row.grouped({each.layer: each for each in rows[start : start + len(row.layers)]})


@pytest.mark.parametrize("family", EVERY)
def test_every_linear_layer_of_the_encoder_is_pruned_and_nothing_else(family):
    before, after, rows = pruned(family, 0.9, "4x1")
    model = family_models.untouched(f"{family}-tiny")
    numbered = {
        name
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D))
        and re.search(r"(layers?|h)\.\d", name)
        # what projects the vectors of distances does so once, at build time
        and not re.search(r"\.pos_(\w+_)?proj$", name)
    }
    assert len(rows) == len(numbered) and {row.layer for row in rows} == numbered
    layers = {f"{row.layer}.weight" for row in rows}
    for name, value in after.items():
        if name not in layers:
            assert torch.equal(value, before[name]), name
    for row in rows:
        w, old = after[f"{row.layer}.weight"], before[f"{row.layer}.weight"]
        assert (row.outputs, row.inputs) == tuple(w.shape) and row.pattern == "4x1"
        blocks = (w == 0).reshape(row.outputs, -1, 4)  # 4 consecutive inputs of one output
        assert torch.equal(blocks.all(2), blocks.any(2))
        assert row.zeros == pytest.approx(0.9, abs=1 / blocks.shape[1])
        assert torch.equal(w[w != 0], old[w != 0])


@pytest.mark.parametrize("family", EVERY)
def test_neurons_go_from_both_layers(family):
    before, after, rows = pruned(family, 0.75, "neurons")
    for into, (out,), first, (second,) in grouped(family, rows):
        gone = (after[f"{second.layer}.weight"] == 0).all(0)
        assert int(gone.sum()) == 384
        for row in first:  # of a gated network both halves, in one layer or two
            both = gone.repeat(row.outputs // 512)
            assert torch.equal((after[f"{row.layer}.weight"] == 0).all(1), both)
            if f"{row.layer}.bias" in after:
                assert torch.equal(after[f"{row.layer}.bias"] == 0, both)
        names = [*((row.layer, ~gone) for row in first), (second.layer, slice(None))]
        for bias, stays in ((f"{name}.bias", stays) for name, stays in names):
            assert bias not in after or torch.equal(after[bias][stays], before[bias][stays])
        assert all(row.zeros == 0 for row in (*into, out))


@pytest.mark.parametrize("family", [name for name in EVERY if name not in TOGETHER])
def test_heads_go_from_all_four_layers(family):
    before, after, rows = pruned(family, 0.5, "heads")
    heads = family_models.untouched(f"{family}-tiny").config.num_attention_heads
    size = 128 // heads
    for into, (out,), first, second in grouped(family, rows):
        # what heads share stays
        assert all(row.zeros == 0 for row in into if row.outputs < 128)
        into = [row for row in into if row.outputs >= 128]
        inputs = [before[f"{row.layer}.weight"].abs() for row in into]
        whole = [*(w.reshape(-1, 128, 128).sum(0) for w in inputs)]
        whole.append(before[f"{out.layer}.weight"].abs().T)
        sums = sum(w.reshape(heads, size, -1).sum((1, 2)) for w in whole)
        gone = (sums <= sums.sort()[0][heads // 2 - 1]).repeat_interleave(size)
        assert torch.equal((after[f"{out.layer}.weight"] == 0).all(0), gone)
        for row in into:
            all_of_them = gone.repeat(row.outputs // 128)
            assert torch.equal((after[f"{row.layer}.weight"] == 0).all(1), all_of_them)
            if f"{row.layer}.bias" in after:
                assert torch.equal(after[f"{row.layer}.bias"] == 0, all_of_them)
        assert all(row.zeros == 0 for row in (*first, *second))


@pytest.mark.parametrize("family", TOGETHER)
def test_heads_whose_parts_lie_together_are_refused(family):
    with pytest.raises(UsageError, match="has no pattern heads"):
        pruned(family, 0.5, "heads")


@pytest.mark.parametrize("pattern", ["32x1", "1x16"])
def test_block_that_does_not_divide_a_layer_is_refused_by_name(pattern):
    model = checkpoints.load("synthetic:bert-odd").model  # 312 channels
    with pytest.raises(UsageError, match=r"multiple of \d+ (in|out)puts; encoder.*has 312"):
        pruning.prune(model, "bert", 0.9, pattern)


@pytest.mark.parametrize(
    ("sparsity", "pattern", "message"),
    [
        (0.9, "4x2", "did you mean '4x1'?"),
        (0.9, "structured", "did you mean 'unstructured'?"),
        (0.0, "4x1", "0 is not between 0 and 1"),
        (1.0, "4x1", "1 is not between 0 and 1"),
        (90.0, "4x1", "90 is not between 0 and 1"),
        (float("nan"), "4x1", "nan is not between"),
        (0.9, "2:4", "is not that of pattern 2:4, which is 0.5"),
    ],
)
def test_what_there_is_not_is_refused(sparsity, pattern, message):
    with pytest.raises(UsageError) as caught:
        pruning.check(sparsity, pattern)
    assert message in str(caught.value)


def test_pattern_has_a_sparsity_of_its_own():
    assert (pruning.check(None, "4x1"), pruning.check(None, "2:4")) == (0.9, 0.5)
    assert pruning.check(0.5, "2:4") == 0.5
