"""OpenAI's routes answer in its form, and refuse in its form."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
from helpers.text_models import TEXTS

CLOSE = dict(rtol=0, atol=2e-5)
DOCUMENTS = [text for text in TEXTS if text]


def embeddings(client: Any, **body: Any) -> Any:
    """The answer to a body."""
    response = client.post("/v1/embeddings", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_embeddings_are_the_originals_as_numbers_and_as_bytes(serve, original) -> None:
    client = serve("dense")
    want = original.encode(DOCUMENTS, normalize_embeddings=True)
    answer = embeddings(client, model="dense", input=DOCUMENTS)
    assert answer["object"] == "list" and answer["model"] == "dense"
    assert [entry["index"] for entry in answer["data"]] == list(range(len(DOCUMENTS)))
    assert {entry["object"] for entry in answer["data"]} == {"embedding"}
    np.testing.assert_allclose([e["embedding"] for e in answer["data"]], want, **CLOSE)
    tokens = sum(len(original.tokenizer(text)["input_ids"]) for text in DOCUMENTS)
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    answer = embeddings(client, model="dense", input=DOCUMENTS, encoding_format="base64")
    vectors = [np.frombuffer(base64.b64decode(e["embedding"]), "<f4") for e in answer["data"]]
    np.testing.assert_allclose(vectors, want, **CLOSE)


def test_embeddings_take_ids_and_dimensions(serve, original) -> None:
    client = serve("dense")
    ids = [original.tokenizer(text)["input_ids"] for text in DOCUMENTS]
    want = original.encode(DOCUMENTS, truncate_dim=8, normalize_embeddings=True)
    for tokens, vectors in ((ids, want), (ids[0], want[:1])):
        answer = embeddings(client, input=tokens, dimensions=8)
        np.testing.assert_allclose([e["embedding"] for e in answer["data"]], vectors, **CLOSE)


def test_model_is_chosen_by_its_name(serve) -> None:
    client = serve("score", "dense")
    assert embeddings(client, input="a")["model"] == "dense"  # the first that can
    listed = client.get("/v1/models").json()
    assert [entry["id"] for entry in listed["data"]] == ["score", "dense"]
    assert client.get("/v1/models/dense").json() == listed["data"][1]
    for response in (
        client.post("/v1/embeddings", json={"model": "nobody", "input": "a"}),
        client.get("/v1/models/no/body"),
    ):
        assert response.status_code == 404
        error = response.json()["error"]
        assert (error["code"], error["type"]) == ("model_not_found", "invalid_request_error")


REFUSED = {
    "no text": ({"input": ""}, 400, "input"),
    "no texts": ({"input": []}, 400, "input"),
    "a number": ({"input": 3}, 400, "input"),
    "nothing": ({"model": "dense"}, 400, "input"),
    "too many": ({"input": ["a"] * 33}, 400, None),
    "no format": ({"input": "a", "encoding_format": "int8"}, 400, "encoding_format"),
    "dimensions": ({"input": "a", "dimensions": 33}, 400, "dimensions"),
    "no embedder": ({"input": "a", "model": "score"}, 400, "model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_body_that_is_wrong_is_refused_in_openais_form(serve, name) -> None:
    body, status, param = REFUSED[name]
    response = serve("dense", "score").post("/v1/embeddings", json=body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and error["param"] == param
