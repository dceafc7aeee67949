"""LayoutLM as an export takes it, against transformers: boxes, mask, pooler and all."""

from __future__ import annotations

import torch
from helpers import family_models

from bertile.families import layoutlm
from bertile.families.table import named

IDS = torch.tensor([[5, 6, 7, 8]])
MASK = torch.tensor([[1, 1, 1, 0]])
ADDED = (1.0 - MASK[:, None, None, :].float()) * -10000.0
BOXES = torch.tensor([[[1, 2, 5, 9], [0, 0, 3, 3], [7, 8, 7, 8], [0, 0, 0, 0]]])


def answer(model, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **inputs).last_hidden_state[:, :3]


def test_prepared_model_takes_boxes_and_a_mask_that_is_added():
    model, prepared = (family_models.untouched("layoutlm-tiny") for _ in range(2))
    prepared.set_attn_implementation("eager")
    assert layoutlm.take_mask(prepared) == ()
    for boxes in (BOXES, torch.zeros_like(BOXES)):
        want = answer(model, attention_mask=MASK, bbox=boxes)
        assert torch.allclose(answer(prepared, attention_mask=ADDED, bbox=boxes), want, atol=1e-5)
    without = answer(model, attention_mask=MASK)
    assert torch.allclose(without, want, atol=1e-5), "none are zeros"
    boxed = answer(model, attention_mask=MASK, bbox=BOXES)
    assert not torch.allclose(boxed, want, atol=1e-2), "boxes matter"


def test_prepared_model_does_without_a_pooler():
    assert not named("layoutlm").optional_pooler
    model = family_models.untouched("layoutlm-tiny")
    model.set_attn_implementation("eager")
    layoutlm.take_mask(model)
    model.pooler = None
    assert model(input_ids=IDS, attention_mask=ADDED, bbox=BOXES).pooler_output is None
