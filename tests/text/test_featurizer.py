"""Vectors of tokens are those of transformers' feature-extraction."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import text_models
from helpers.text_models import LONG, TEXTS, mixed

from bertile.errors import BertileError
from bertile.text.featurizer import Featurizer

CLOSE = dict(rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def featurizer(saved) -> Featurizer:
    return text_models.stand_in(saved("encoder"), "encoder")


def test_features_are_those_of_feature_extraction(featurizer, saved) -> None:
    import transformers

    original = transformers.pipeline("feature-extraction", str(saved("encoder")), device="cpu")
    texts = [*TEXTS, LONG]
    want = original(texts, truncation=True, return_tensors=True)
    got = featurizer.features(texts)
    for mine, theirs in zip(got, want, strict=True):
        assert mine.dtype == np.float32
        np.testing.assert_allclose(mine, theirs[0].numpy(), **CLOSE)
    assert featurizer.truncated == 1
    single = featurizer.features(texts[0])
    np.testing.assert_allclose(single, got[0], **CLOSE)


def test_many_texts_keep_their_order(featurizer) -> None:
    texts = mixed(600)
    every = list(featurizer.features_iter(iter(texts)))
    for text, rows in list(zip(texts, every, strict=True))[::60]:
        np.testing.assert_allclose(rows, featurizer.features(text), **CLOSE)
    assert featurizer.features([]) == []


def test_text_that_is_too_long_is_refused_where_it_is_not_to_be_cut(featurizer) -> None:
    with pytest.raises(BertileError, match=r"text 2 has \d+ tokens, the model takes at"):
        featurizer.features(["a", LONG], truncate=False)
