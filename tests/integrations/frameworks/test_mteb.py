"""A bundle scores in mteb what the model itself scores there, prompts included."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from helpers.tiny_bundle import change_manifest

pytestmark = pytest.mark.slow  # compiles MiniLM; the package is in the extra "slow"
pytest.importorskip("mteb", reason="the extra 'mteb' is not installed")


def task():
    """A task of sentences that lie here: how alike pairs are, from 0 to 5."""
    import datasets
    import mteb
    from mteb.abstasks.sts import AbsTaskSTS

    class Pairs(AbsTaskSTS):
        metadata = mteb.TaskMetadata(
            name="BertilePairs",
            description="Pairs of sentences, scored by hand.",
            type="STS",
            main_score="cosine_spearman",
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            dataset={"path": "none", "revision": "none"},
        )

        def load_data(self, *_args, **_options):
            rows = [
                ("A man plays a guitar.", "Someone plays an instrument.", 4.0),
                ("A man plays a guitar.", "A woman slices an onion.", 0.5),
                ("The cat sleeps.", "A kitten is asleep.", 4.5),
                ("The cat sleeps.", "The dog barks loudly.", 1.5),
                ("Stocks fell on Monday.", "Shares dropped at the start of the week.", 4.2),
                ("Stocks fell on Monday.", "It rained on Tuesday.", 0.8),
                ("He reads a book.", "He reads a newspaper.", 3.0),
                ("She runs.", "She runs.", 5.0),
            ]
            columns = dict(zip(("sentence1", "sentence2", "score"), map(list, zip(*rows))))
            self.dataset = {"test": datasets.Dataset.from_dict(columns)}
            self.data_loaded = True

    return Pairs()


def evaluated(model) -> dict[str, float]:
    import mteb

    result = mteb.evaluate(model, task(), cache=None, show_progress_bar=False)
    (scores,) = result.task_results[0].scores["test"]
    return {name: value for name, value in scores.items() if isinstance(value, float)}


def test_scores_are_those_of_the_model_itself(minilm, texts):
    from bertile.integrations.mteb import Encoder

    encoder = Encoder(minilm)
    ours, theirs = evaluated(encoder), evaluated(texts.model)
    assert set(ours) == set(theirs) and "cosine_pearson" in ours
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert ours["main_score"] > 0.8
    assert encoder.mteb_model_meta.embed_dim == 384


@pytest.mark.parametrize("name", ["dot", "euclidean", "manhattan"])
def test_similarity_is_the_model_s_own(minilm, texts, tmp_path, monkeypatch, name):
    from bertile.integrations.mteb import Encoder

    place = shutil.copytree(minilm, tmp_path / "other")
    change_manifest(place, lambda manifest: manifest["text"].update(similarity=name))
    monkeypatch.setattr(texts.model, "similarity_fn_name", name)
    encoder, vectors = Encoder(place), texts.plain
    got = encoder.similarity(vectors[:2], vectors)
    np.testing.assert_allclose(got, texts.model.similarity(vectors[:2], vectors), atol=1e-4)
    got = encoder.similarity_pairwise(vectors, vectors[::-1])
    want = texts.model.similarity_pairwise(vectors, vectors[::-1].copy())
    np.testing.assert_allclose(got, want, atol=1e-4)
    scores = evaluated(encoder)
    if name == "dot":
        assert scores == pytest.approx(evaluated(texts.model), abs=1e-4)
    else:  # mteb has no such similarity for a model, but a figure of its own
        assert scores["pearson"] == pytest.approx(scores[f"{name}_pearson"], abs=1e-4)


@pytest.mark.parametrize(("kind", "name"), [("query", "of_query"), ("document", "of_documents")])
def test_texts_of_a_kind_get_its_prompt(minilm, texts, kind, name):
    from mteb.types import PromptType

    from bertile.integrations.mteb import Encoder

    batch = [texts.query] if kind == "query" else texts.all
    vectors = Encoder(minilm).encode(
        [{"text": batch[:2]}, {"text": batch[2:]}],
        task_metadata=task().metadata,
        hf_split="test",
        hf_subset="default",
        prompt_type=PromptType(kind),
    )
    np.testing.assert_allclose(vectors, np.atleast_2d(getattr(texts, name)), atol=1e-4)
