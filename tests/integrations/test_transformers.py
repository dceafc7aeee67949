"""Bundles in transformers' pipelines answer as the models that they were made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import originals

pytest.importorskip("transformers", reason="what is compared needs it")
import torch
import transformers
from transformers import AutoTokenizer, pipeline

import bertile
from bertile import loader
from bertile.base.errors import UsageError
from bertile.config import Config
from bertile.integrations import transformers as drop_in

LABELS = {
    "sequence-classification": ("entailment", "neutral", "contradiction"),
    "token-classification": ("O", "B-CAT", "I-CAT", "B-MAT"),
}
AUTO = {
    "encoder": "AutoModel",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "masked-lm": "AutoModelForMaskedLM",
}
MASKED = ["the [MASK] sat on a mat.", "this [MASK] is good"]


class Models:
    """Of each head the directory of an original and that of its bundle, made on first use."""

    def __init__(self, place: Path, make: Any) -> None:
        self.place, self.make = place, make

    def original(self, head: str) -> Path:
        path = self.place / head
        return path if path.exists() else originals.save(path, head, LABELS.get(head, ()))

    def bundle(self, head: str) -> Path:
        path = self.place / f"{head}-bundle"
        return path if path.exists() else self.make(self.original(head), path, head)

    def pipes(self, task: str, head: str, **options: Any) -> tuple[Any, Any]:
        """The pipeline of the original, and that of the bundle."""
        path = self.original(head)
        theirs = getattr(transformers, AUTO[head]).from_pretrained(path)
        ours = drop_in.CLASSES[head].from_pretrained(self.bundle(head))
        tokenizers = [AutoTokenizer.from_pretrained(place) for place in (path, self.bundle(head))]
        return tuple(
            pipeline(task, model=model, tokenizer=tokenizer, device=-1, **options)
            for model, tokenizer in zip((theirs, ours), tokenizers)
        )


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "load", originals.load)
        yield Models(tmp_path_factory.mktemp("models"), originals.compute)


def same(got: Any, want: Any) -> None:
    """Results of a pipeline are alike: numbers nearly, all else equal."""
    assert type(got) is type(want)
    if isinstance(want, dict):
        assert list(got) == list(want)
        for key in want:
            same(got[key], want[key])
    elif isinstance(want, (list, tuple)):
        assert len(got) == len(want)
        for mine, theirs in zip(got, want):
            same(mine, theirs)
    elif isinstance(want, (float, np.floating)):
        assert got == pytest.approx(want, abs=1e-4)
    else:
        assert got == want


def compare_tasks(models: Models) -> None:
    """All pipelines of text, with the arguments that change what is asked of a model."""
    theirs, ours = models.pipes("feature-extraction", "encoder")
    results = [pipe(originals.TEXTS, truncation=True) for pipe in (ours, theirs)]
    for got, want in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4)

    head = "sequence-classification"
    theirs, ours = models.pipes("text-classification", head, truncation=True)
    pairs = [{"text": first, "text_pair": second} for first, second in originals.PAIRS]
    for inputs in (originals.TEXTS, originals.TEXTS[0], pairs):
        same(ours(inputs), theirs(inputs))
        same(ours(inputs, top_k=None), theirs(inputs, top_k=None))
    same(ours(originals.TEXTS, batch_size=4), theirs(originals.TEXTS))

    theirs, ours = models.pipes("zero-shot-classification", head)
    for several in (False, True):
        choice = {"candidate_labels": ["cat", "mat"], "multi_label": several}
        same(ours("the cat", **choice), theirs("the cat", **choice))

    for strategy in ("none", "simple", "average"):
        theirs, ours = models.pipes(
            "token-classification", "token-classification", aggregation_strategy=strategy
        )
        same(ours(originals.TEXTS[:3], batch_size=3), theirs(originals.TEXTS[:3]))

    theirs, ours = models.pipes("fill-mask", "masked-lm")
    same(ours(MASKED, batch_size=2), theirs(MASKED))
    same(ours(MASKED[0], targets=["cat", "dog"]), theirs(MASKED[0], targets=["cat", "dog"]))


def compare_outputs(models: Models, head: str) -> None:
    """What a direct call gives, padded, with token types."""
    tokenizer = AutoTokenizer.from_pretrained(models.bundle(head))
    first, second = zip(*originals.PAIRS)
    batch = tokenizer(first, second, padding=True, truncation=True, return_tensors="pt")
    theirs = getattr(transformers, AUTO[head]).from_pretrained(models.original(head)).eval()
    ours = drop_in.CLASSES[head].from_pretrained(models.bundle(head))
    with torch.no_grad():
        want, got = theirs(**batch), ours(**batch)
    assert list(got) == list(want)
    for name, tensor in want.items():
        mine = got[name]
        assert mine.dtype == torch.float32 and mine.shape == tensor.shape
        if tensor.shape[:2] == batch["input_ids"].shape:  # of padding, anything may be said
            mine, tensor = (values[batch["attention_mask"] == 1] for values in (mine, tensor))
        torch.testing.assert_close(mine, tensor, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(ours(**batch, return_dict=False), got.values()))


def test_pipelines_answer_as_with_the_original(models):
    compare_tasks(models)


@pytest.mark.parametrize("head", AUTO)
def test_outputs_are_the_originals(models, head):
    compare_outputs(models, head)


@pytest.mark.slow  # five compiles
def test_compiled_bundles_answer_as_the_originals(tmp_path, stages):
    def compiled(original: Path, output: Path, head: str) -> Path:
        bertile.compile(str(original), output, Config(cache_dir=stages, head=head))
        return output

    models = Models(tmp_path, compiled)
    compare_tasks(models)
    for head in AUTO:
        compare_outputs(models, head)


def test_sentence_embeddings_have_a_class_of_their_own(models):
    model = drop_in.BertileModelForSentenceEmbedding.from_pretrained(models.bundle("embedding"))
    ids = torch.tensor([[2, 11, 3]])
    vectors = model(input_ids=ids).sentence_embedding
    assert vectors.shape == (1, originals.SIZES["hidden_size"])
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(1))


def test_tensors_are_the_librarys_memory(models):
    model = drop_in.BertileModelForMaskedLM.from_pretrained(models.bundle("masked-lm"))
    logits = model(input_ids=torch.tensor([[2, 4, 3]])).logits
    assert np.shares_memory(logits.numpy(), model.bundle.last["logits"])


def test_pipelines_know_the_classes(models, caplog):
    """Else each logs an error that the model is not supported."""
    transformers.logging.enable_propagation()
    try:
        models.pipes("text-classification", "sequence-classification")
        models.pipes("token-classification", "token-classification")
    finally:
        transformers.logging.disable_propagation()
    assert [r.message for r in caplog.records if "not supported" in r.message] == []


def test_saved_pipeline_is_loaded_again(models, tmp_path):
    _, ours = models.pipes("text-classification", "sequence-classification")
    ours.save_pretrained(tmp_path)
    ours.save_pretrained(tmp_path)  # over itself
    again = pipeline(
        "text-classification",
        model=drop_in.BertileModelForSequenceClassification.from_pretrained(tmp_path),
        tokenizer=AutoTokenizer.from_pretrained(tmp_path),
    )
    assert again.model.bundle.directory == tmp_path / drop_in.SUBFOLDER
    assert again("a good movie") == ours("a good movie")
    assert again.model.config.id2label == dict(enumerate(LABELS["sequence-classification"]))


def test_labels_are_the_bundles_where_it_has_no_config(models, tmp_path):
    """As of an ONNX file."""
    original = originals.save(tmp_path / "model", "token-classification", ("O", "X", "Y"))
    bundle = originals.compute(original, tmp_path / "bundle", "token-classification")
    (bundle / "config.json").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "check_files", lambda *_: None)
        model = drop_in.BertileModelForTokenClassification.from_pretrained(bundle)
    assert model.config.id2label == {0: "O", 1: "X", 2: "Y"} and model.config.num_labels == 3


def test_bundle_of_another_head_is_refused(models):
    with pytest.raises(UsageError, match=r"needs the head masked-lm, the bundle has encoder; use"):
        drop_in.BertileModelForMaskedLM.from_pretrained(models.bundle("encoder"))


def test_options_that_a_bundle_cannot_follow_are_refused(models):
    with pytest.raises(UsageError, match="does not take device_map, dtype"):
        drop_in.BertileModelForMaskedLM.from_pretrained("x", dtype="auto", device_map="cpu")
    model = drop_in.BertileModelForFeatureExtraction.from_pretrained(models.bundle("encoder"))
    ids = torch.tensor([[2, 3]])
    with pytest.raises(UsageError, match="does not take output_hidden_states"):
        model(input_ids=ids, output_hidden_states=True)
    assert model(input_ids=ids, output_attentions=False, labels=None).last_hidden_state is not None
    with pytest.raises(UsageError, match="not pushed"):
        model.save_pretrained("x", push_to_hub=True)
