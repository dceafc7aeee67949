"""KServe's routes: a model's outputs for texts, pairs and ids, as the original library has them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from helpers import text_models

TEXTS = ["The cat sat on the mat.", "a", "Zoë lives in New York, not in Berlin!"]


def tensor(name: str, array: Any, datatype: str = "INT64") -> dict[str, Any]:
    array = np.asarray(array, object if datatype == "BYTES" else np.int64)
    data = array.reshape(-1).tolist()
    return {"name": name, "datatype": datatype, "shape": list(array.shape), "data": data}


def texts(*texts: str, name: str = "text") -> dict[str, Any]:
    return tensor(name, texts, "BYTES")


def infer(client: Any, model: str, *inputs: dict[str, Any], **more: Any) -> dict[str, np.ndarray]:
    answer = client.post(f"/v2/models/{model}/infer", json={"inputs": list(inputs), **more})
    assert answer.status_code == 200, answer.text
    message = answer.json()
    assert message["model_name"] == model
    return {
        entry["name"]: np.array(entry["data"], np.float32).reshape(entry["shape"])
        for entry in message["outputs"]
    }


def error(client: Any, model: str, body: Any, path: str = "infer") -> tuple[int, str]:
    answer = client.post(f"/v2/models/{model}/{path}", content=json.dumps(body))
    assert list(answer.json()) == ["error"]
    return answer.status_code, answer.json()["error"]


def test_health_and_what_is_there_are_told(serve: Any) -> None:
    client = serve("dense", "labels")
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    assert client.get("/v2").json()["extensions"] == ["binary_tensor_data"]
    assert client.get("/v2/models/labels/ready").json() == {"name": "labels", "ready": True}
    dense, labels = (client.get(f"/v2/models/{name}").json() for name in ("dense", "labels"))
    names = [entry["name"] for entry in dense["inputs"]]
    assert names == ["text", "input_ids", "attention_mask"] and dense["versions"] == ["1"]
    assert dense["outputs"][0]["shape"] == [-1, text_models.SIZES["hidden_size"]]
    assert [entry["name"] for entry in labels["inputs"]][1] == "text_pair"
    assert labels["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 3]}]
    assert client.get("/v2/models/dense/versions/1").json() == dense
    for path in (
        "/v2/models/none",
        "/v2/models/dense/versions/2",
        "/v2/models/none/ready",
        "/v2/x",
    ):
        answer = client.get(path)
        assert answer.status_code == 404 and list(answer.json()) == ["error"]


def test_texts_give_the_vectors_of_the_original(serve: Any, original: Any) -> None:
    client = serve("dense")
    for inputs in (texts(*TEXTS), tensor("text", [[text] for text in TEXTS], "BYTES")):
        (vectors,) = infer(client, "dense", inputs).values()
        np.testing.assert_allclose(vectors, original.encode(TEXTS), atol=1e-5)
    parameters = {"normalize": True, "prompt_name": "query", "dimensions": 8}
    (vectors,) = infer(client, "dense", texts(*TEXTS), parameters=parameters).values()
    wanted = original.encode(TEXTS, prompt_name="query", normalize_embeddings=True, truncate_dim=8)
    np.testing.assert_allclose(vectors, wanted, atol=1e-5)


def test_ids_with_their_mask_give_what_the_text_gives(serve: Any, original: Any) -> None:
    rows = original.tokenizer(TEXTS, padding=True, return_tensors="np")
    inputs = [tensor(name, rows[name]) for name in ("input_ids", "attention_mask")]
    (vectors,) = infer(serve("dense"), "dense", *inputs).values()
    np.testing.assert_allclose(vectors, original.encode(TEXTS), atol=1e-5)


def test_pairs_give_logits(serve: Any, directories: Any) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directories["labels"])
    module = AutoModelForSequenceClassification.from_pretrained(directories["labels"]).eval()
    others = ["the old film", "paris", "it was good"]
    with torch.inference_mode():
        rows = tokenizer(TEXTS, others, padding=True, return_tensors="pt")
        wanted = module(**rows).logits.numpy()
    pair = texts(*others, name="text_pair")
    outputs = infer(serve("labels"), "labels", texts(*TEXTS), pair)
    np.testing.assert_allclose(outputs["logits"], wanted, atol=1e-5)


def test_outputs_by_token_end_in_zeros(serve: Any, directories: Any) -> None:
    features = text_models.stand_in(directories["encoder"], "encoder").features(TEXTS)
    (rows,) = infer(serve("encoder"), "encoder", texts(*TEXTS)).values()
    assert rows.shape == (3, max(map(len, features)), text_models.SIZES["hidden_size"])
    for row, feature in zip(rows, features):
        np.testing.assert_allclose(row[: len(feature)], feature, atol=1e-5)
        assert not row[len(feature) :].any()


def test_sparse_vectors_come_whole(serve: Any) -> None:
    client = serve("splade")
    (rows,) = infer(client, "splade", texts("the old cat")).values()
    answer = client.post("/embed_sparse", json={"inputs": "the old cat"}).json()[0]
    assert {entry["index"] for entry in answer} == set(np.flatnonzero(rows[0]))


@pytest.mark.parametrize(
    "inputs, status, words",
    [
        ([texts()], 400, "cannot be empty"),
        ([texts("a", "")], 400, "cannot be empty"),
        ([texts(*["a"] * 33)], 413, "batch size 33 > maximum allowed batch size 32"),
        ([texts("a"), tensor("input_ids", [[1]])], 400, "does not take the inputs"),
        ([texts("a", name="words")], 400, "does not take the inputs words"),
        ([texts("a"), texts("b", name="text_pair")], 400, "takes no pairs"),
        ([tensor("input_ids", [[10**6]])], 422, "ids"),
        ([tensor("input_ids", [[1]]), tensor("attention_mask", [[0]])], 400, "cannot be empty"),
        ([tensor("input_ids", [1])], 400, "not INT64"),
        ([tensor("text", [1])], 400, "datatype INT64, not BYTES"),
    ],
)
def test_inputs_that_the_model_cannot_take_are_refused(
    serve: Any, inputs: list, status: int, words: str
) -> None:
    code, message = error(serve("dense"), "dense", {"inputs": inputs})
    assert code == status and words in message


@pytest.mark.parametrize(
    "more, words",
    [
        ({"parameters": {"dimensions": 0}}, "parameter dimensions"),
        ({"parameters": {"normalize": "yes"}}, "parameter normalize"),
        ({"parameters": {"prompt_name": "none"}}, "'none' is unknown"),
        ({"outputs": [{"name": "logits"}]}, "output 'logits' is unknown"),
        ({"id": 1}, "id of the request"),
    ],
)
def test_what_else_is_wrong_with_a_request_is_said(serve: Any, more: dict, words: str) -> None:
    code, message = error(serve("dense"), "dense", {"inputs": [texts("a")], **more})
    assert code in (400, 422) and words in message


def test_unknown_models_and_broken_messages_are_refused(serve: Any) -> None:
    client = serve("dense")
    assert error(client, "none", {})[0] == 404
    assert error(client, "dense", {"inputs": []}, "versions/2/infer")[0] == 404
    answer = client.post("/v2/models/dense/infer", content=b"{")
    assert answer.status_code == 400 and "no JSON" in answer.json()["error"]
    headers = {"Inference-Header-Content-Length": "9"}
    answer = client.post("/v2/models/dense/infer", content=b"{}", headers=headers)
    assert answer.status_code == 400 and "the body has 2 bytes" in answer.json()["error"]


def test_the_page_of_routes_has_them(serve: Any) -> None:
    document = serve("dense").get("/openapi.json").json()
    operation = document["paths"]["/v2/models/{name}/infer"]["post"]
    assert "requestBody" in operation and {"400", "404", "429"} <= set(operation["responses"])
    assert not any("versions" in path for path in document["paths"])
