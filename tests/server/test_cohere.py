"""Cohere's routes rank documents as `bertile.open` does, in its form."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import text_models
from helpers.text_models import TEXTS

DOCUMENTS = [text for text in TEXTS if text]
QUERY = "Who lives in New York?"


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank"])
def test_rerank_gives_the_best_documents_first(serve, directories, path) -> None:
    model = text_models.stand_in(directories["score"], "sequence-classification")
    want = model.rank(QUERY, DOCUMENTS, activation_fn="sigmoid")
    body = {"model": "score", "query": QUERY, "documents": DOCUMENTS}
    answer = serve("dense", "score").post(path, json=body).json()
    assert [r["index"] for r in answer["results"]] == [entry["corpus_id"] for entry in want]
    scores = [result["relevance_score"] for result in answer["results"]]
    np.testing.assert_allclose(scores, [entry["score"] for entry in want], atol=2e-5)
    assert answer["id"] and answer["meta"]["api_version"]["version"] == path[2]


def test_rerank_takes_documents_with_text_and_gives_them_back(serve) -> None:
    documents = [DOCUMENTS[0], {"text": DOCUMENTS[1]}, {"text": DOCUMENTS[2]}]
    body = {"query": QUERY, "documents": documents, "top_n": 2, "return_documents": True}
    results = serve("score").post("/v1/rerank", json=body).json()["results"]
    assert len(results) == 2
    assert all(r["document"] == {"text": DOCUMENTS[r["index"]]} for r in results)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"query": "a", "documents": []}, 400),
        ({"query": "a"}, 422),
        ({"query": "a", "documents": ["b"], "top_n": 0}, 422),
        ({"query": "a", "documents": ["b"], "model": "nobody"}, 404),
        ({"query": "a", "documents": ["b"] * 33}, 413),
    ],
)
def test_body_that_is_wrong_is_refused_in_coheres_form(serve, body, status) -> None:
    response = serve("score").post("/v1/rerank", json=body)
    assert response.status_code == status
    assert list(response.json()) == ["message"]
