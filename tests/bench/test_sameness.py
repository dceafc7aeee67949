"""What engines' outputs have in common: cosines of real tokens, and doubts."""

from __future__ import annotations

import numpy as np
import pytest

from bertile.bench import sameness


def test_padding_is_not_compared() -> None:
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    tokens = np.ones((2, 3, 4), np.float32)
    other = tokens.copy()
    other[mask == 0] = -5
    vectors = np.ones((2, 4), np.float32)
    same = sameness.compared([tokens, vectors], [other, vectors], {"attention_mask": mask})
    assert same == {"cosine": pytest.approx(1), "max_abs_difference": 0}
    other[1, 0] = [1, 1, 1, -1]
    same = sameness.compared([tokens, vectors], [other, vectors], {"attention_mask": mask})
    assert same["cosine"] == pytest.approx((2 + 0.5 + 2) / 5) and same["max_abs_difference"] == 2


def test_float32_outputs_of_another_size_are_not_the_same_model() -> None:
    row = {"engine": "onnxruntime", "precision": "fp32", "cosine": 1.0}
    assert sameness.doubt({**row, "max_abs_difference": 5e-3}) is None
    assert "differ from float32's by 0.02" in str(
        sameness.doubt({**row, "max_abs_difference": 0.02})
    )
    assert sameness.doubt({**row, "precision": "int8", "max_abs_difference": 0.02}) is None


def test_precision_that_only_peers_have_is_judged_as_our_coarsest() -> None:
    row = {"engine": "peer", "precision": "int3", "max_abs_difference": 1.0}
    assert sameness.doubt({**row, "cosine": 0.99}) is None
    assert "cosine of 0.2000" in str(sameness.doubt({**row, "cosine": 0.2}))
