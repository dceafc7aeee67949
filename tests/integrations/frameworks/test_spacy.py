"""spaCy's documents, spans and tokens get the vectors of sentence-transformers."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest

pytestmark = pytest.mark.slow  # compiles MiniLM; the package is in the extra "slow"
pytest.importorskip("spacy", reason="the extra 'spacy' is not installed")


@pytest.fixture
def nlp(minilm):
    import spacy

    import bertile.integrations.spacy  # noqa: F401 (it registers the component)

    nlp = spacy.blank("en")
    nlp.add_pipe("bertile", config={"bundle": str(minilm)})
    return nlp


def test_documents_have_the_vectors_of_sentence_transformers(nlp, texts):
    docs = list(nlp.pipe(texts.all, batch_size=4))
    assert [doc.text for doc in docs] == texts.all
    np.testing.assert_allclose([doc.vector for doc in docs], texts.plain, atol=1e-4)
    doc = nlp(texts.all[0])
    np.testing.assert_allclose(doc.vector, texts.plain[0], atol=1e-4)
    assert doc.has_vector and doc.vector_norm == pytest.approx(1, abs=1e-4)


def test_spans_and_tokens_have_the_vectors_of_their_own_texts(nlp, texts):
    doc = nlp("A man is playing a guitar. Stocks fell.")
    span, token = doc[0:6], doc[5]
    want = texts.model.encode([span.text, token.text])
    np.testing.assert_allclose([span.vector, token.vector], want, atol=1e-4)
    assert span.has_vector and token.has_vector
    assert doc[0:7].similarity(doc[7:10]) == pytest.approx(
        float(texts.model.similarity(*texts.model.encode([doc[0:7].text, doc[7:10].text]))),
        abs=1e-4,
    )


def test_similarity_is_the_model_s_and_nothing_warns(nlp, texts):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = nlp(texts.all[0]), nlp(texts.all[1])
        similarity = first.similarity(second)
    assert similarity == pytest.approx(float(texts.plain[0] @ texts.plain[1]), abs=1e-4)


def test_pipeline_is_saved_with_its_bundle_and_documents_are_pickled(nlp, texts, tmp_path):
    import spacy

    nlp.to_disk(tmp_path / "pipeline")
    again = spacy.load(tmp_path / "pipeline")
    np.testing.assert_allclose(again(texts.all[0]).vector, texts.plain[0], atol=1e-4)
    doc = pickle.loads(pickle.dumps(again("Stocks fell.")))
    want = texts.model.encode("Stocks")
    np.testing.assert_allclose(doc[0].vector, want, atol=1e-4)
