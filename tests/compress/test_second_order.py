"""Second order: exact shares, and outputs nearer than by magnitudes alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bertile.compress import masks, second_order
from bertile.compress.recipe import PATTERNS, Prune
from bertile.export import checkpoints
from bertile.families import table
from bertile.numerics.zeros import analyse


def correlated(tokens: int, inputs: int, seed: int = 1) -> torch.Tensor:
    """Inputs that go together, as those of real layers do."""
    chance = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs // 4, inputs, generator=chance)
    x = torch.randn(tokens, inputs // 4, generator=chance) @ mix
    return x + 0.3 * torch.randn(tokens, inputs, generator=chance)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("inputs", [64, 208])
def test_outputs_are_nearer_than_by_magnitude(pattern, inputs):
    x = correlated(600, inputs)
    w = torch.randn(48, inputs, generator=torch.Generator().manual_seed(2))
    sparsity = 0.5
    pruned = second_order.pruned_weight(w, x.T @ x, sparsity, pattern)
    blocks = masks.kept(masks.in_blocks(w.abs(), pattern), sparsity, pattern)
    plain = w * masks.spread(blocks, pattern)
    assert float((pruned == 0).float().mean()) == sparsity
    assert analyse(pruned.numpy().T).pattern == pattern
    mine, theirs = (float((x @ (w - other).T).square().mean()) for other in (pruned, plain))
    assert mine < 0.65 * theirs


def test_uncorrelated_inputs_leave_what_stays_as_it_was():
    w = torch.randn(8, 16, generator=torch.Generator().manual_seed(3))
    pruned = second_order.pruned_weight(w, torch.eye(16) * 100, 0.5, "unstructured")
    stays = pruned != 0
    torch.testing.assert_close(pruned[stays], w[stays])
    assert w[stays].abs().min() >= w[~stays].abs().max() - 1e-6, "the smallest go"


def test_share_is_exact_where_it_fits_no_block():
    w = torch.randn(7, 200, generator=torch.Generator().manual_seed(4))
    x = correlated(300, 200)
    pruned = second_order.pruned_weight(w, x.T @ x, 0.37, "4x1")
    blocks = masks.in_blocks(pruned.abs(), "4x1")
    assert int((blocks == 0).sum()) == round(0.37 * blocks.numel())


def test_whole_encoder_is_pruned_by_what_comes_in():
    checkpoint = checkpoints.load("synthetic:bert-tiny")
    model, family = checkpoint.model, table.named(checkpoint.family)
    chance = np.random.default_rng(5)
    ids = torch.from_numpy(chance.integers(5, 1000, (16, 12)))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["attention_mask"][:, 9:] = 0
    with torch.no_grad():
        wanted = model(**batch).last_hidden_state[:, :9]
    second_order.prune(model, family, Prune("second-order", "4x1", 0.5), [batch])
    with torch.no_grad():
        mine = model(**batch).last_hidden_state[:, :9]
    plain = checkpoints.load("synthetic:bert-tiny@0.5:4x1").model
    with torch.no_grad():
        theirs = plain(**batch).last_hidden_state[:, :9]
    for layer in family.encoder_layers(model):
        assert all(float((m.weight == 0).float().mean()) == 0.5 for m in layer.values())
    assert (mine - wanted).square().mean() < 0.7 * (theirs - wanted).square().mean()
