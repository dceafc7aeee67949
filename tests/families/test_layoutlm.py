"""LayoutLM without boxes, as transformers computes it with boxes of zeros: mask, pooler and all."""

from __future__ import annotations

import torch
from helpers import family_models

from bertile.families import layoutlm
from bertile.families.table import named

IDS = torch.tensor([[5, 6, 7, 8]])
MASK = torch.tensor([[1, 1, 1, 0]])
ADDED = (1.0 - MASK[:, None, None, :].float()) * -10000.0


def answer(model, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **inputs).last_hidden_state[:, :3]


def test_prepared_model_equals_boxes_of_zeros_and_takes_a_mask_that_is_added():
    model, prepared = (family_models.untouched("layoutlm-tiny") for _ in range(2))
    prepared.set_attn_implementation("eager")
    (note,) = layoutlm.leave_boxes_out(prepared)
    assert "boxes are not an input" in note
    zeros = torch.zeros(1, 4, 4, dtype=torch.int64)
    want = answer(model, attention_mask=MASK, bbox=zeros)
    assert torch.allclose(answer(prepared, attention_mask=ADDED), want, atol=1e-5)
    boxed = answer(model, attention_mask=MASK, bbox=zeros + torch.tensor([1, 2, 5, 9]))
    assert not torch.allclose(boxed, want, atol=1e-2), "boxes matter"


def test_prepared_model_does_without_a_pooler():
    assert not named("layoutlm").optional_pooler
    model = family_models.untouched("layoutlm-tiny")
    model.set_attn_implementation("eager")
    layoutlm.leave_boxes_out(model)
    model.pooler = None
    assert model(input_ids=IDS, attention_mask=ADDED).pooler_output is None
