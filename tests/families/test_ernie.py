"""ERNIE's task types: folded where the model has them, with a note; nothing changes elsewhere."""

from __future__ import annotations

import pytest
import torch
import transformers

from bertile.export import synthetic
from bertile.families import ernie
from bertile.families.embeddings import fold_token_type

IDS = torch.tensor([[5, 6, 7, 8]])


def model(**changes):
    config = synthetic.config("ernie-tiny")
    config.update(changes)
    return synthetic.build(transformers.AutoModel, config)


def answer(encoder) -> torch.Tensor:
    with torch.no_grad():
        return encoder(input_ids=IDS).last_hidden_state


@pytest.mark.parametrize("types", [1, 4])
def test_folded_task_gives_what_transformers_gives_without_a_task(types):
    encoder = model(type_vocab_size=types)
    want, table = answer(encoder), encoder.embeddings.task_type_embeddings
    looked_up = []
    table.register_forward_hook(lambda *_: looked_up.append(1))
    if types == 1:
        fold_token_type(encoder.embeddings)
    (note,) = ernie.fold_task_type(encoder)
    assert "every token is of task 0" in note
    assert torch.allclose(answer(encoder), want, atol=1e-5) and not looked_up
    other = model(type_vocab_size=types)
    with torch.no_grad():
        other = other(input_ids=IDS, task_type_ids=torch.ones_like(IDS)).last_hidden_state
    assert not torch.allclose(other, want, atol=1e-2), "the task matters"


def test_model_without_task_types_stays_as_it_is():
    encoder = model(use_task_id=False)
    want, positions = answer(encoder), encoder.embeddings.position_embeddings
    assert ernie.fold_task_type(encoder) == ()
    assert encoder.embeddings.position_embeddings is positions
    assert torch.equal(answer(encoder), want)
