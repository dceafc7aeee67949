"""Entities are those of transformers' token-classification, for both ways to cut words."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from helpers import text_models
from helpers.text_models import LONG, TEXTS, assert_same, mixed

from bertile.base.allowed import AGGREGATIONS
from bertile.errors import BertileError
from bertile.text.tagger import Tagger

ALL = [*TEXTS, LONG, "zqx 🙂 東京 ÄÖÜ", "  blank before", "New-York's-cat...", "1998-3,5"]


@pytest.fixture(scope="module", params=["tagger", "roberta-tagger"])
def kind(request) -> str:
    """BERT, which marks pieces that continue a word, and RoBERTa, which marks blanks."""
    return request.param


@pytest.fixture(scope="module")
def tagger(saved, kind) -> Tagger:
    return text_models.stand_in(saved(kind), "token-classification")


@pytest.fixture(scope="module")
def original(saved, kind):
    import transformers

    return transformers.pipeline("token-classification", str(saved(kind)), device="cpu")


@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
@pytest.mark.parametrize("strategy", AGGREGATIONS)
def test_entities_are_those_of_token_classification(tagger, original, strategy) -> None:
    want = original(ALL, aggregation_strategy=strategy)
    assert sum(map(len, want)) > 20
    got = tagger.entities(ALL, strategy)
    assert_same(got, want, 2e-5)
    assert_same(list(tagger.entities_iter(iter(ALL), strategy)), want, 2e-5)
    assert_same(tagger.entities(ALL[0], strategy.upper()), want[0], 2e-5)
    assert tagger.truncated == 0


@pytest.mark.parametrize("labels", [(), ("O", "PER", "B-PER", "I-PER")])
@pytest.mark.parametrize("strategy", ["none", "simple"])
def test_labels_to_ignore_are_left_out(tagger, original, labels, strategy) -> None:
    want = original(ALL[0], aggregation_strategy=strategy, ignore_labels=list(labels))
    assert_same(tagger.entities(ALL[0], strategy, labels), want, 2e-5)


def test_many_texts_keep_their_order(tagger) -> None:
    texts = mixed(600)
    want = [tagger.entities(text) for text in texts[::50]]
    assert_same(tagger.entities(texts)[::50], want, 2e-5)


def test_entities_come_before_the_texts_are_exhausted(tagger) -> None:
    def texts() -> Iterator[str]:
        while True:  # endless
            yield "Zoë lives in New York"

    entities = tagger.entities_iter(texts())
    assert_same(next(entities), tagger.entities("Zoë lives in New York"), 2e-5)
    entities.close()


def test_unknown_strategy_is_refused_at_once(tagger) -> None:
    for ask, texts in (
        (tagger.entities, "a"),
        (tagger.entities, ["a"]),
        (tagger.entities_iter, []),
    ):
        with pytest.raises(BertileError, match="aggregation_strategy 'frist' is unknown; did"):
            ask(texts, "frist")
    with pytest.raises(BertileError, match="a str is no list of texts"):
        tagger.entities_iter("New York")
    with pytest.raises(BertileError, match="text 1 is a int, not a str"):
        tagger.entities([3])
