"""Heads and neurons: those of no effect go first, and what went is computed as if it were not."""

from __future__ import annotations

import pytest
import torch

from bertile.compress import learner, structured
from bertile.compress.recipe import Structured
from bertile.export import checkpoints
from bertile.families import table

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def opened(name: str = "bert-tiny"):
    checkpoint = checkpoints.load(f"synthetic:{name}")
    return checkpoint.model, table.named(checkpoint.family)


def loss_of(model):
    return lambda ids: model(input_ids=ids).last_hidden_state[:, 0].square().sum()


def test_units_without_effect_go_first():
    model, family = opened()
    for layer in family.encoder_layers(model):
        _, (out,), _, (second,) = family.grouped(layer)
        out.weight.data[:, :64] *= 1e-6  # the first of two heads
        second.weight.data[:, ::4] *= 1e-6
    gone = structured.remove(
        model, family, Structured(heads=0.5, neurons=0.25), [IDS], loss_of(model)
    )
    assert gone == {"heads": 2, "neurons": 256}
    for layer in family.encoder_layers(model):
        _, (out,), _, (second,) = family.grouped(layer)
        assert (out.weight[:, :64] == 0).all() and (out.weight[:, 64:] != 0).all()
        zero = (second.weight == 0).all(0)
        assert zero[::4].all() and zero.sum() == 128


def test_every_layer_keeps_a_unit():
    model, family = opened("distilbert-tiny")
    gone = structured.remove(model, family, Structured(heads=1.0), [IDS], loss_of(model))
    assert gone["heads"] == 2, "of four, one of each layer stays"


def test_what_went_stays_away_while_the_rest_trains_and_folds():
    model, family = opened()
    structured.remove(model, family, Structured(heads=0.25, neurons=0.5), [IDS], loss_of(model))
    before = {name: value.detach().clone() for name, value in _zeros(model, family)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(3):
        loss_of(model)(IDS).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = dict(_zeros(model, family))
    assert all(torch.equal(after[name] == 0, value == 0) for name, value in before.items())
    assert sum(int((value == 0).sum()) for value in before.values()) > 0
    with torch.no_grad():
        wanted = model(input_ids=IDS).last_hidden_state
        learner.fold(model)
        torch.testing.assert_close(model(input_ids=IDS).last_hidden_state, wanted)
    assert not any("parametrizations" in name for name in model.state_dict())


def _zeros(model, family):
    for layer in family.encoder_layers(model):
        for name, linear in layer.items():
            yield f"{name}.weight", linear.weight
            yield f"{name}.bias", linear.bias


def test_gated_networks_lose_both_halves_of_a_neuron():
    model, family = opened("modernbert-tiny")
    structured.remove(model, family, Structured(neurons=0.5), [IDS], loss_of(model))
    for layer in family.encoder_layers(model):
        _, _, (first,), (second,) = family.grouped(layer)
        gone = (second.weight == 0).all(0)
        assert torch.equal((first.weight == 0).all(1), gone.repeat(2))
    assert pytest.approx(0.5) == float(gone.float().mean()) or gone.any()
