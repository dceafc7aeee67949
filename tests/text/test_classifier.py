"""Scores and labels are those of CrossEncoder and of transformers' pipelines."""

from __future__ import annotations

import inspect
import json
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import text_models
from helpers.text_models import LONG, TEXTS, assert_same, mixed

from bertile.errors import BertileError
from bertile.families import text_settings
from bertile.text import scores
from bertile.text.classifier import Classifier

QUERY = "Who lives in New York?"
PAIRS = [(QUERY, text) for text in (*TEXTS, LONG)]
CLOSE = dict(rtol=0, atol=2e-5)


@pytest.fixture(scope="module", params=["score", "labels"])
def kind(request) -> str:
    """A reranker, with a single label, and a classifier of three."""
    return request.param


@pytest.fixture(scope="module")
def original(saved, kind):
    from sentence_transformers import CrossEncoder

    return CrossEncoder(str(saved(kind)), device="cpu")


@pytest.fixture(scope="module")
def classifier(saved, kind) -> Classifier:
    return text_models.stand_in(saved(kind), "sequence-classification")


def pipeline(task: str, saved, kind: str):
    import transformers

    return transformers.pipeline(task, str(saved(kind)), device="cpu")


@pytest.mark.parametrize("inputs", [PAIRS, PAIRS[0], list(PAIRS[0]), QUERY])
def test_scores_are_those_of_cross_encoder(classifier, original, inputs) -> None:
    got, want = classifier.predict(inputs), original.predict(inputs)
    assert (np.shape(got), got.dtype) == (want.shape, want.dtype)
    np.testing.assert_allclose(got, want, **CLOSE)


def test_texts_in_a_list_are_scored_by_themselves(classifier, original) -> None:
    """Which CrossEncoder takes for a single input of several texts."""
    want = np.stack([original.predict(text) for text in TEXTS])
    np.testing.assert_allclose(classifier.predict(list(TEXTS)), want, **CLOSE)


@pytest.mark.parametrize("name", ["Sigmoid", "Identity", "Softmax"])
def test_activations_are_those_of_torch_or_their_names(classifier, original, name) -> None:
    import torch

    function = getattr(torch.nn, name)(*([-1] if name == "Softmax" else []))
    want = original.predict(PAIRS, activation_fn=function)
    for asked in (function, name, name.lower()):
        np.testing.assert_allclose(classifier.predict(PAIRS, activation_fn=asked), want, **CLOSE)


@pytest.mark.parametrize(
    "options",
    [
        {"apply_softmax": True},
        {"prompt": "the old "},
        {"convert_to_tensor": True},
        {"convert_to_numpy": False},
        {"batch_size": 2},
    ],
    ids=str,
)
def test_options_of_predict_do_what_they_do_there(classifier, original, options) -> None:
    got, want = classifier.predict(PAIRS, **options), original.predict(PAIRS, **options)
    assert type(got) is type(want)
    np.testing.assert_allclose(
        np.stack([np.asarray(row) for row in got]),
        np.stack([np.asarray(row) for row in want]),
        **CLOSE,
    )


def test_no_pairs_have_no_scores(classifier, original) -> None:
    assert classifier.predict([]).shape == original.predict([]).shape
    assert classifier.predict(np.array(PAIRS[:2])).shape[0] == 2


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 2}, {"return_documents": True}, {"activation_fn": "identity"}],
    ids=str,
)
def test_ranks_are_those_of_cross_encoder(saved, options) -> None:
    import torch
    from sentence_transformers import CrossEncoder

    classifier = text_models.stand_in(saved("score"), "sequence-classification")
    theirs = (
        {**options, "activation_fn": torch.nn.Identity()} if "activation_fn" in options else options
    )
    want = CrossEncoder(str(saved("score")), device="cpu").rank(QUERY, list(TEXTS), **theirs)
    assert_same(classifier.rank(QUERY, list(TEXTS), **options), want, 2e-5)


def test_rank_of_several_labels_is_refused(saved) -> None:
    classifier = text_models.stand_in(saved("labels"), "sequence-classification")
    with pytest.raises(BertileError, match="rank needs a model with a single label, this has 3"):
        classifier.rank(QUERY, list(TEXTS))


@pytest.mark.parametrize(
    "options",
    [
        {},
        *({"top_k": 1}, {"top_k": 2}, {"top_k": None}),
        *({"function_to_apply": "sigmoid"}, {"function_to_apply": "SOFTMAX"}),
        {"function_to_apply": "none", "top_k": None},
    ],
    ids=str,
)
def test_labels_are_those_of_text_classification(classifier, saved, kind, options) -> None:
    original = pipeline("text-classification", saved, kind)
    pair = {"text": QUERY, "text_pair": TEXTS[0]}
    for texts in (TEXTS[0], list(TEXTS), [TEXTS[0]], pair, [pair, {"text": QUERY}]):
        want = original(texts, **options)
        assert_same(classifier.classify(texts, **options), want, 2e-5)
    assert_same(classifier.classify((QUERY, TEXTS[0])), original(pair), 2e-5)
    got = classifier.classify_iter(iter(TEXTS), **options)
    assert_same(list(got), original(list(TEXTS), **options), 2e-5)


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("labels", [["film", "new york", "cat"], "film, cat", ["film"], "city"])
def test_labels_without_training_are_those_of_zero_shot_classification(
    saved, labels, multi_label
) -> None:
    original = pipeline("zero-shot-classification", saved, "labels")
    classifier = text_models.stand_in(saved("labels"), "sequence-classification")
    for texts in (TEXTS[0], [TEXTS[0], TEXTS[2], LONG]):
        want = original(texts, labels, multi_label=multi_label)
        got = classifier.zero_shot(texts, labels, multi_label=multi_label)
        assert_same(got, want, 2e-5)
    template = "it is not about {} ."
    want = original(TEXTS[2], labels, hypothesis_template=template)
    assert_same(classifier.zero_shot(TEXTS[2], labels, template), want, 2e-5)


def test_zero_shot_without_entailment_or_labels_is_refused(saved) -> None:
    classifier = text_models.stand_in(saved("score"), "sequence-classification")
    with pytest.raises(BertileError, match="the labels relevant have no 'entailment'"):
        classifier.zero_shot("a", ["cat"])
    classifier = text_models.stand_in(saved("labels"), "sequence-classification")
    for labels, template in (([], "{}"), (" , ", "{}"), (["cat"], "no place")):
        with pytest.raises(BertileError, match="zero_shot needs labels, and a template"):
            classifier.zero_shot("a", labels, template)
    assert classifier.zero_shot([], ["cat"]) == []


def test_many_texts_keep_their_order(classifier, original) -> None:
    pairs = [(QUERY, text) for text in mixed(700)]
    want = original.predict(pairs, batch_size=64)
    np.testing.assert_allclose(classifier.predict(iter(pairs)), want, **CLOSE)


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("predict", (["a", 3],), "text 2 is a int, not a str or a pair of them"),
        ("predict", ([("a", "b", "c")],), "text 1 is a tuple"),
        ("predict", (["a", "b", "c"], "nobody"), "prompt 'nobody' is unknown"),
        ("classify", ({"texts": "a"},), "text 1 is a dict, not a str or a pair of them or {"),
        ("classify", ([{"text": "a", "pair": "b"}],), "text 1 is a dict"),
        ("classify", ("a", 1, "tanh"), "function 'tanh' is unknown"),
        ("classify", (b"a",), "a bytes is no list of texts"),
    ],
)
def test_what_makes_no_sense_is_named(saved, method, arguments, message) -> None:
    classifier = text_models.stand_in(saved("labels"), "sequence-classification")
    with pytest.raises(BertileError) as caught:
        getattr(classifier, method)(*arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize("problem", [None, "regression", "multi_label_classification"])
@pytest.mark.parametrize("count", [1, 3])
def test_scores_of_every_problem_are_those_of_the_pipelines_code(tmp_path, problem, count) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    logits = np.array([[1.5, -0.5, 0.25]], np.float32)[:, :count]
    config = transformers.BertConfig(num_labels=count, problem_type=problem)
    want = transformers.TextClassificationPipeline.postprocess(
        SimpleNamespace(model=SimpleNamespace(config=config)),
        {"logits": torch.from_numpy(logits)},
        top_k=1,
    )
    (tmp_path / "config.json").write_text(json.dumps({"problem_type": problem}))
    values = scores.FUNCTIONS[text_settings.read(tmp_path, count).scores](logits[0])
    assert f"LABEL_{values.argmax()}" == want["label"]
    assert values.max() == pytest.approx(want["score"])


@pytest.mark.parametrize("name", ["predict", "rank"])
def test_arguments_are_those_of_the_original_in_their_order(name) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    theirs = list(inspect.signature(getattr(sentence_transformers.CrossEncoder, name)).parameters)
    ours = inspect.signature(getattr(Classifier, name)).parameters
    positional = [n for n, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == theirs[: len(positional)]
    assert {n for n, p in ours.items() if p.kind is p.KEYWORD_ONLY} == {"truncate"}
