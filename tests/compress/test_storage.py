"""Weights of few values: k-means beside scikit-learn's, binary ones, and what both cost."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bertile.compress import learner, storage
from bertile.compress.recipe import Storage
from bertile.numerics import eight_bit


def test_clusters_are_as_good_as_scikit_learns():
    cluster = pytest.importorskip("sklearn.cluster")
    w = torch.randn(40, 50, generator=torch.Generator().manual_seed(1))
    rounded = storage.Clusters(w, 9)(w)
    assert len(rounded.unique()) <= 9
    theirs = cluster.KMeans(8, n_init=3, random_state=0).fit(w.reshape(-1, 1).numpy())
    assert float((w - rounded).square().sum()) < 1.05 * theirs.inertia_


def test_zeros_stay_zeros_and_gradients_pass():
    w = torch.randn(16, 16, generator=torch.Generator().manual_seed(2))
    w[:, :4] = 0
    for kind in (storage.Binary(), storage.Clusters(w, 4)):
        held = w.clone().requires_grad_()
        rounded = kind(held)
        assert (rounded[:, :4] == 0).all()
        rounded.sum().backward()
        assert torch.equal(held.grad, torch.ones_like(w))


def test_binary_weights_are_exact_in_int8():
    w = torch.randn(12, 64, generator=torch.Generator().manual_seed(3))
    binary = storage.Binary()(w).detach()
    assert all(len(row.abs().unique()) == 1 for row in binary)
    columns = binary.numpy().T
    scale = eight_bit.weight_scales(columns)
    assert (eight_bit.quantize_weights(columns, scale) * scale == columns).all()


@pytest.mark.parametrize("form", ["k-means", "binary"])
def test_layers_train_and_fold_and_say_their_bytes(form):
    model = nn.Sequential(nn.Linear(32, 16))
    asked = Storage(form, 8)
    storage.install({"0": model[0]}, asked)
    seen = model[0].weight.detach().clone()
    learner.fold(model)
    assert torch.equal(model[0].weight, seen)
    report = storage.report({"0": model[0]}, asked)
    assert report["fp32_bytes"] == 4 * 512
    assert report["bytes"] == {"k-means": 512 * 3 // 8 + 32, "binary": 64 + 64}[form]
    assert "bundle" in report["note"]
