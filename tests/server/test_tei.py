"""Text Embeddings Inference's routes answer as the models' own libraries do, in its form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import text_models
from helpers.text_models import LONG, TEXTS, assert_same

# The same model in the same library: rows of a batch with less padding differ in the last digits.
CLOSE = dict(rtol=0, atol=2e-5)
QUERY = "Who lives in New York?"
DOCUMENTS = [text for text in (*TEXTS, LONG) if text]


def post(client: Any, path: str, status: int = 200, **body: Any) -> Any:
    """The JSON of the answer to a body."""
    response = client.post(path, json=body)
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    return response.json()


def refusal(client: Any, path: str, status: int, **body: Any) -> tuple[str, str]:
    """The words and the word of an error."""
    error = post(client, path, status, **body)
    assert set(error) == {"error", "error_type"}
    return error["error"], error["error_type"]


def test_embed_gives_the_originals_vectors(serve, original) -> None:
    client = serve("dense")
    want = original.encode(DOCUMENTS, normalize_embeddings=True)
    np.testing.assert_allclose(post(client, "/embed", inputs=DOCUMENTS), want, **CLOSE)
    np.testing.assert_allclose(post(client, "/embed", inputs=DOCUMENTS[0]), want[:1], **CLOSE)
    np.testing.assert_allclose(post(client, "/", inputs=DOCUMENTS[0]), want[:1], **CLOSE)
    np.testing.assert_allclose(post(client, "/dense/embed", inputs=DOCUMENTS), want, **CLOSE)


@pytest.mark.parametrize(
    ("body", "options"),
    [
        ({"normalize": False}, {}),
        ({"prompt_name": "query", "normalize": False}, {"prompt_name": "query"}),
        ({"dimensions": 8, "normalize": False}, {"truncate_dim": 8}),
        ({"dimensions": 8}, {"truncate_dim": 8, "normalize_embeddings": True}),
    ],
)
def test_embed_takes_the_originals_options(serve, original, body, options) -> None:
    got = post(serve("dense"), "/embed", inputs=DOCUMENTS, **body)
    np.testing.assert_allclose(got, original.encode(DOCUMENTS, **options), **CLOSE)


def test_embed_takes_ids(serve, original) -> None:
    client = serve("dense")
    ids = [original.tokenizer(text, truncation=True)["input_ids"] for text in DOCUMENTS]
    want = original.encode(DOCUMENTS, normalize_embeddings=True)
    np.testing.assert_allclose(post(client, "/embed", inputs=ids), want, **CLOSE)
    np.testing.assert_allclose(post(client, "/embed", inputs=ids[0]), want[:1], **CLOSE)
    mixed = [DOCUMENTS[0], ids[1], DOCUMENTS[2]]
    np.testing.assert_allclose(post(client, "/embed", inputs=mixed), want[:3], **CLOSE)
    words, kind = refusal(client, "/embed", 422, inputs=[[2, 10_000_000, 3]])
    assert kind == "Validation" and "no list of ids" in words


def test_texts_are_cut_where_the_request_or_the_server_says_so(serve, original) -> None:
    client, refusing = serve("dense"), serve("dense", auto_truncate=False)
    ids = original.tokenizer(LONG)["input_ids"]
    last = [ids[0], *ids[1 - original.max_seq_length :]]
    want = post(client, "/embed", inputs=last)
    assert len(last) == original.max_seq_length < len(ids)
    got = post(client, "/embed", inputs=LONG, truncation_direction="left")
    np.testing.assert_allclose(got, want, **CLOSE)
    for cut in (
        post(client, "/embed", inputs=LONG),
        post(refusing, "/embed", inputs=LONG, truncate=True),
    ):
        np.testing.assert_allclose(
            cut[0], original.encode(LONG, normalize_embeddings=True), **CLOSE
        )
    for answer in (
        refusal(client, "/embed", 422, inputs=LONG, truncate=False),
        refusal(refusing, "/embed", 422, inputs=LONG),
    ):
        assert answer[1] == "Validation" and "tokens" in answer[0]


def test_default_prompt_is_that_of_the_server(serve, original) -> None:
    want = original.encode(DOCUMENTS, prompt_name="passage", normalize_embeddings=True)
    for settings in ({"default_prompt": "film "}, {"default_prompt_name": "passage"}):
        got = post(serve("dense", **settings), "/embed", inputs=DOCUMENTS)
        np.testing.assert_allclose(got, want, **CLOSE)
    words, kind = refusal(serve("dense"), "/embed", 422, inputs="a", prompt_name="nobody")
    assert kind == "Validation" and "prompt 'nobody' is unknown" in words


def test_embed_all_gives_the_vectors_of_tokens(serve, directories) -> None:
    model = text_models.stand_in(directories["encoder"], "encoder")
    got = post(serve("encoder"), "/embed_all", inputs=DOCUMENTS)
    for mine, want in zip(got, model.features(DOCUMENTS), strict=True):
        np.testing.assert_allclose(mine, want, **CLOSE)


def test_embed_sparse_gives_the_weights_that_are_not_zero(serve, directories) -> None:
    client = serve("splade")
    model = text_models.stand_in_of_splade(directories["splade"])
    vectors = model.encode(DOCUMENTS)
    for mine, want in zip(post(client, "/embed_sparse", inputs=DOCUMENTS), vectors, strict=True):
        assert [entry["index"] for entry in mine] == want.indices.tolist()
        np.testing.assert_allclose([entry["value"] for entry in mine], want.values, **CLOSE)
    dense = post(client, "/embed", inputs=DOCUMENTS, normalize=False)
    np.testing.assert_allclose(dense, [vector.dense() for vector in vectors], **CLOSE)
    words, kind = refusal(client, "/embed", 424, inputs="a")
    assert (words, kind) == (
        "Backend error: `normalize` is not available for SPLADE models",
        "Backend",
    )


def logits(directory: Any, pairs: list[Any]) -> np.ndarray:
    """What the original says of texts or pairs."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory).eval()
    columns = list(zip(*pairs)) if isinstance(pairs[0], tuple) else [pairs]
    tensors = tokenizer(*map(list, columns), padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        return model(**tensors).logits.numpy()


def test_rerank_orders_texts_by_their_scores(serve, directories) -> None:
    client = serve("score")
    want = logits(directories["score"], [(QUERY, text) for text in DOCUMENTS])[:, 0]
    body = {"query": QUERY, "texts": DOCUMENTS}
    for raw, scores in ((True, want), (False, 1 / (1 + np.exp(-want)))):
        ranks = post(client, "/rerank", **body, raw_scores=raw, return_text=raw)
        assert [rank["index"] for rank in ranks] == np.argsort(-scores, kind="stable").tolist()
        np.testing.assert_allclose([r["score"] for r in ranks], np.sort(scores)[::-1], **CLOSE)
        assert [rank.get("text") for rank in ranks] == [
            DOCUMENTS[rank["index"]] if raw else None for rank in ranks
        ]
    assert refusal(client, "/rerank", 400, query="a", texts=[]) == (
        "`texts` cannot be empty",
        "Empty",
    )


def test_predict_gives_labels_by_their_scores(serve, directories) -> None:
    client = serve("labels")
    rows = logits(directories["labels"], DOCUMENTS)
    shares = np.exp(rows) / np.exp(rows).sum(1, keepdims=True)
    names = ("contradiction", "neutral", "entailment")
    for raw, scores in ((True, rows), (False, shares)):
        want = [
            sorted(
                ({"score": float(v), "label": n} for v, n in zip(row, names)),
                key=lambda entry: -entry["score"],
            )
            for row in scores
        ]
        batch = [[text] for text in DOCUMENTS]
        assert_same(post(client, "/predict", inputs=batch, raw_scores=raw), want, 2e-5)
        assert_same(post(client, "/predict", inputs=DOCUMENTS[0], raw_scores=raw), want[0], 2e-5)
    pair = logits(directories["labels"], [("a", "the cat")])[0]
    got = post(client, "/predict", inputs=["a", "the cat"], raw_scores=True)
    assert_same([entry["score"] for entry in got], sorted(pair.tolist(), reverse=True), 2e-5)


def test_similarity_is_the_cosine(serve, original) -> None:
    inputs = {"source_sentence": DOCUMENTS[0], "sentences": DOCUMENTS[1:]}
    vectors = original.encode(DOCUMENTS, normalize_embeddings=True)
    got = post(serve("dense"), "/similarity", inputs=inputs)
    np.testing.assert_allclose(got, vectors[1:] @ vectors[0], **CLOSE)
    inputs = {"source_sentence": "a", "sentences": []}
    assert refusal(serve("dense"), "/similarity", 400, inputs=inputs)[1] == "Empty"


def test_tokens_have_the_bytes_that_they_stand_for(serve, original) -> None:
    client = serve("dense")
    texts = [text for text in TEXTS if text]
    for text, tokens in zip(texts, post(client, "/tokenize", inputs=texts), strict=True):
        assert [token["id"] for token in tokens] == original.tokenizer(text)["input_ids"]
        for token in tokens:
            if token["special"]:
                assert token["start"] is token["stop"] is None
            else:
                piece = text.encode()[token["start"] : token["stop"]].decode()
                assert piece == token["text"]
        plain = post(client, "/tokenize", inputs=text, add_special_tokens=False)[0]
        assert plain == tokens[1:-1]
    ids = [original.tokenizer(text)["input_ids"] for text in texts]
    want = original.tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert post(client, "/decode", ids=ids) == want
    assert post(client, "/decode", ids=ids[0]) == want[:1]
    assert "[CLS]" in post(client, "/decode", ids=ids[0], skip_special_tokens=False)[0]


def test_info_says_what_is_served(serve, original) -> None:
    client = serve("dense", "labels", max_concurrent_requests=7)
    info = client.get("/info").json()
    assert info["served_model_name"] == "dense" and info["models"] == ["dense", "labels"]
    assert info["max_input_length"] == original.max_seq_length
    assert info["max_concurrent_requests"] == 7 and info["max_client_batch_size"] == 32
    assert info["max_batch_tokens"] == 512 and "embedding" in info["model_type"]
    labels = client.get("/labels/info").json()["model_type"]["classifier"]
    assert labels["id2label"] == {"0": "contradiction", "1": "neutral", "2": "entailment"}


def test_each_route_is_answered_by_the_first_model_that_can(serve) -> None:
    client = serve("labels", "score", "encoder", "dense")
    assert len(post(client, "/embed", inputs="a")[0]) == 32
    assert len(post(client, "/predict", inputs="a")) == 3
    assert len(post(client, "/", inputs="a")) == 3  # what the first is for
    assert len(post(client, "/rerank", query="a", texts=["b", "the"])) == 2
    assert len(post(client, "/embed_all", inputs="a")[0]) == 3
    assert len(post(client, "/score/predict", inputs="a")) == 1
    assert refusal(client, "/score/embed", 424, inputs="a")[1] == "Backend"
    assert refusal(client, "/nobody/embed", 404, inputs="a")[1] == "NotFound"


WRONG_MODEL = {
    "/embed": ("score", {"inputs": "a"}, "Model is not an embedding model"),
    "/embed_all": ("splade", {"inputs": "a"}, "`embed_all` is not available for SPLADE models"),
    "/embed_sparse": (
        "dense",
        {"inputs": "a"},
        "Model is not an embedding model with SPLADE pooling",
    ),
    "/rerank": ("labels", {"query": "a", "texts": ["b"]}, "model is not a re-ranker model"),
    "/predict": ("dense", {"inputs": "a"}, "Model is not a classifier model"),
}


@pytest.mark.parametrize("path", WRONG_MODEL)
def test_wrong_kind_of_model_is_refused_in_the_originals_words(serve, path) -> None:
    kind, body, words = WRONG_MODEL[path]
    assert refusal(serve(kind), path, 424, **body) == (f"Backend error: {words}", "Backend")


REFUSED = {
    "no inputs": ({"inputs": []}, 400, "Empty", "`inputs` cannot be empty"),
    "no text": ({"inputs": ""}, 400, "Empty", "`inputs` cannot be empty"),
    "no text among others": ({"inputs": ["a", ""]}, 400, "Empty", "`inputs` cannot be empty"),
    "too many": (
        {"inputs": ["a"] * 33},
        413,
        "Validation",
        "batch size 33 > maximum allowed batch size 32",
    ),
    "a number": ({"inputs": 3}, 422, "Validation", "inputs"),
    "nothing": ({}, 422, "Validation", "inputs: Field required"),
    "no flag": ({"inputs": "a", "normalize": "yes"}, 422, "Validation", "normalize"),
    "no side": ({"inputs": "a", "truncation_direction": "up"}, 422, "Validation", "direction"),
    "no dimensions": ({"inputs": "a", "dimensions": 0}, 422, "Validation", "dimensions"),
    "dimensions": ({"inputs": "a", "dimensions": 33}, 422, "Validation", "`dimensions` should be"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_body_that_is_wrong_is_refused_with_its_status(serve, name) -> None:
    body, status, kind, words = REFUSED[name]
    said, word = refusal(serve("dense"), "/embed", status, **body)
    assert words in said and word == kind


def test_headers_say_what_was_computed(serve, original) -> None:
    response = serve("dense").post(
        "/embed", json={"inputs": ["the cat", "a"]}, headers={"x-request-id": "mine-1"}
    )
    headers = response.headers
    assert headers["x-compute-characters"] == "8" and headers["x-request-id"] == "mine-1"
    assert headers["x-compute-tokens"] == str(2 + 2 + 1 + 2)
    assert headers["x-compute-type"] == "cpu+optimized"
    for name in ("compute", "total", "tokenization", "queue", "inference"):
        assert int(headers[f"x-{name}-time"]) >= 0
