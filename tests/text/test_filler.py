"""Words for a mask are those of transformers' fill-mask."""

from __future__ import annotations

import logging
import re

import pytest
from helpers import text_models
from helpers.text_models import LONG, assert_same, mixed

from bertile.errors import BertileError
from bertile.text.filler import Filler


@pytest.fixture(scope="module", params=["filler", "roberta-filler"])
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def filler(saved, kind) -> Filler:
    return text_models.stand_in(saved(kind), "masked-lm")


@pytest.fixture(scope="module")
def original(saved, kind):
    import transformers

    return transformers.pipeline("fill-mask", str(saved(kind)), device="cpu")


@pytest.fixture(scope="module")
def texts(filler: Filler) -> list[str]:
    mask = filler.mask_token
    return [
        f"The cat sat on the {mask}.",
        f"{mask}",
        f"Zoë lives in {mask} York, not in {mask}!",
        f"東京 🙂 {mask} naïve",
        f"{mask}{mask} was good",
    ]


def test_words_are_those_of_fill_mask(filler, original, texts) -> None:
    want = original(texts)
    assert_same(filler.fill(texts), want, 2e-5)
    for text, answers in zip(texts, want):
        assert_same(filler.fill(text), answers, 2e-5)
    assert len(filler.fill([texts[0]])) == 1  # a list of a text gives a list, unlike there


@pytest.mark.parametrize("top_k", [1, 2, 100])
def test_as_many_come_as_are_asked_for(filler, original, texts, top_k) -> None:
    assert_same(filler.fill(texts[0], top_k), original(texts[0], top_k=top_k), 2e-5)


@pytest.mark.parametrize("targets", ["cat", ["cat", "good", "bad"], ["movies", "cat"], [" old"]])
def test_targets_are_chosen_from_as_there(filler, original, texts, targets, caplog) -> None:
    want = original(texts, targets=targets)
    with caplog.at_level(logging.WARNING, "bertile"):
        assert_same(filler.fill(texts, targets=targets), want, 2e-5)
    words = [targets] if isinstance(targets, str) else targets
    unknown = [word for word in words if filler.tokenizer.token_to_id(word) is None]
    named = [record.getMessage() for record in caplog.records if record.name == "bertile"]
    assert len(named) == len(unknown)
    assert all(f"'{word}' is no token" in text for word, text in zip(unknown, named))


def test_many_texts_keep_their_order(filler) -> None:
    texts = [f"{filler.mask_token} {text}" for text in mixed(60)]
    assert_same(filler.fill(texts)[::9], [filler.fill(text) for text in texts[::9]], 2e-5)


def test_what_cannot_be_filled_is_named(filler) -> None:
    mask = filler.mask_token
    with pytest.raises(BertileError, match=f"text 2 has no {re.escape(mask)}"):
        filler.fill([f"a {mask}", "a cat"])
    with pytest.raises(
        BertileError, match=f"{re.escape(mask)} among the 48 tokens that are kept of it"
    ):
        filler.fill(f"{LONG} {mask}")
    with pytest.raises(BertileError, match="targets is empty"):
        filler.fill(f"a {mask}", targets=[])
    with pytest.raises(BertileError, match="the target '' has no token"):
        filler.fill(f"a {mask}", targets=[""])
    with pytest.raises(BertileError, match="text 1 is a int, not a str"):
        filler.fill([3])


def test_tokenizer_without_a_mask_is_named(words, filler) -> None:
    model = filler.model
    with pytest.raises(BertileError, match="the tokenizer has no mask token"):
        Filler(model, words).fill("a b")
