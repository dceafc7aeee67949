"""A server refuses what it must: without its key, when it is full, fails or is late."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from helpers.text_models import TEXTS

from bertile.errors import BundleError

DOCUMENTS = [text for text in TEXTS if text]
WAIT = 20.0  # seconds, for what is sure to come


class Gate:
    """Keeps a stand-in's calls waiting while it is closed, and lets them fail."""

    def __init__(self, model: Any) -> None:
        self.open, self.arrived = threading.Event(), threading.Semaphore(0)
        self.open.set()
        self.failing: Exception | None = None
        self._module = model.model.module
        self.config = self._module.config
        model.model.module = self

    def __call__(self, **tensors: Any) -> Any:
        self.arrived.release()
        assert self.open.wait(WAIT)
        if self.failing is not None:
            raise self.failing
        return self._module(**tensors)


@pytest.fixture
def gated(serve, open_stand_in):
    """A client of a server with a single stream, and its model's gate."""

    def start(**settings: Any) -> tuple[Any, Gate]:
        client = serve("dense", workers=1, **settings)
        return client, Gate(open_stand_in.opened[-1])

    return start


def embed(client: Any, text: Any = "the cat", **options: Any) -> Any:
    return client.post("/embed", json={"inputs": text}, **options)


def value(client: Any, name: str) -> float:
    """A metric's value, summed over its labels."""
    lines = client.get("/metrics").text.splitlines()
    rows = [line.rpartition(" ") for line in lines if line.startswith((name + "{", name + " "))]
    assert rows, name
    return sum(float(row[2]) for row in rows)


def test_full_house_refuses_at_once_and_says_when_to_come_again(gated) -> None:
    client, gate = gated(max_concurrent_requests=3)
    gate.open.clear()
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(embed, client) for _ in range(3)]
        while value(client, "bertile_requests_in_house") < 3:
            time.sleep(0.005)
        began = time.monotonic()
        refused = embed(client)
        assert time.monotonic() - began < WAIT / 2
        openai = client.post("/v1/embeddings", json={"input": "a"})
        # a full house reads no body, so it does not say what is wrong with one
        assert client.post("/embed", content=b"{").status_code == 429
        assert client.post("/embed", content=b" " * 100_000).status_code == 429
        gate.open.set()
        assert {answer.result().status_code for answer in waiting} == {200}
    assert refused.status_code == openai.status_code == 429
    assert refused.json() == {"error": "Model is overloaded", "error_type": "Overloaded"}
    assert int(refused.headers["retry-after"]) >= 1
    assert openai.json()["error"]["code"] == "rate_limit_exceeded"
    assert embed(client).status_code == 200
    assert value(client, "te_request_failure") == 4


def test_model_that_fails_answers_424_and_stays_up(gated) -> None:
    client, gate = gated()
    gate.failing = RuntimeError("a bit flipped")
    answer = embed(client)
    assert answer.status_code == 424
    assert answer.json() == {
        "error": "Backend error: RuntimeError: a bit flipped",
        "error_type": "Backend",
    }
    gate.failing = None
    assert embed(client).status_code == 200
    assert client.get("/health").status_code == 200


def test_answer_that_comes_too_late_is_none(gated) -> None:
    client, gate = gated()
    gate.open.clear()
    for header, text in (("x-request-timeout", "0.05"), ("x-envoy-expected-rq-timeout-ms", "50")):
        answer = embed(client, headers={header: text})
        assert answer.status_code == 504
        assert answer.json() == {"error": "the deadline is over", "error_type": "Timeout"}
    gate.open.set()
    assert embed(client, headers={"x-request-timeout": "20"}).status_code == 200
    for text in ("soon", "-1", "0", "inf"):
        assert embed(client, headers={"x-request-timeout": text}).status_code == 400


def test_work_of_a_client_that_goes_away_is_dropped(gated) -> None:
    client, gate = gated()
    app = client.app
    gate.open.clear()
    left = asyncio.Event()
    body = json.dumps({"inputs": ["the cat", "mat"]}).encode()

    async def go_away() -> list[Any]:
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        sent: list[Any] = []

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "path": "/embed", "method": "POST", "headers": []}
        call = asyncio.create_task(app(scope, receive, send))
        first = asyncio.create_task(asyncio.to_thread(gate.arrived.acquire, timeout=WAIT))
        await asyncio.sleep(0)
        assert app.service.in_house == 1
        left.set()
        await asyncio.wait_for(call, WAIT)
        gate.open.set()
        await first
        return sent

    portal = client.portal
    assert portal.call(go_away) == []
    assert app.service.in_house == 0
    assert embed(client).status_code == 200
    assert value(client, "te_request_failure") == 1


@pytest.mark.parametrize("path", ["/embed", "/v1/embeddings", "/models", "/nobody/embed"])
def test_key_is_asked_for(serve, path) -> None:
    client = serve("dense", api_key="secret", admin_key="secret")
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
        answer = client.post(path, json={"inputs": "a"}, headers=headers)
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    right = {"authorization": "Bearer secret"}
    assert client.post(path, json={}, headers=right).status_code != 401
    for public in ("/health", "/ping", "/metrics", "/docs", "/openapi.json"):
        assert client.get(public).status_code == 200
    assert client.get("/info").status_code == 401


def test_bodies_are_limited_and_read_as_what_they_are(serve) -> None:
    client = serve("dense", payload_limit=1000)
    assert embed(client, "a " * 600).status_code == 413
    pieces = (piece for piece in (b'{"inputs": "', b"a " * 600, b'"}'))
    assert client.post("/embed", content=pieces).status_code == 413
    for content, content_type, status in (
        (b'{"inputs": "a"}', "application/json; charset=utf-8", 200),
        (b'{"inputs": "a"}', None, 200),
        (b'{"inputs": "a"}', "text/plain", 415),
        (b'{"inputs": "a"', "application/json", 400),
        (b'{"inputs": "\xff"}', "application/json", 400),
        (b"", "application/json", 400),
        (b"[]", "application/json", 422),
    ):
        headers = {"content-type": content_type} if content_type else {}
        answer = client.post("/embed", content=content, headers=headers)
        assert answer.status_code == status, content
        if status != 200:
            assert set(answer.json()) == {"error", "error_type"}


def test_large_bodies_have_a_limit_together(serve) -> None:
    client = serve("dense", payload_limit=1_000_000)
    held = client.app.service.held

    async def ask() -> Any:
        pieces = [b'"}', b"a " * 50_000, b'{"inputs": "']
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": pieces.pop(), "more_body": bool(pieces)}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "path": "/embed", "method": "POST", "headers": []}
        await client.app(scope, receive, send)
        return sent[0]["status"], dict(sent[0]["headers"])

    assert client.portal.call(ask)[0] == 200 and held.bytes == 0
    held.most = 90_000
    status, headers = client.portal.call(ask)
    assert status == 429 and headers[b"retry-after"] == b"1" and held.bytes == 0
    assert embed(client).status_code == 200


def test_paths_and_methods_that_are_none_are_refused_in_their_form(serve) -> None:
    client = serve("dense")
    for path in ("/nothing", "/a/b/c", "/dense/nothing"):
        assert client.get(path).status_code == 404
        assert client.get(path).json()["error_type"] == "NotFound"
    answer = client.get("/embed")
    assert answer.status_code == 405 and "POST" in answer.headers["allow"]
    assert client.get("/v1/nothing").json()["error"]["type"] == "invalid_request_error"


def test_model_is_exchanged_while_the_old_one_answers(gated, directories, open_stand_in) -> None:
    client, gate = gated(admin_key="boss")
    key = {"authorization": "Bearer boss"}
    gate.open.clear()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(embed, client)
        assert gate.arrived.acquire(timeout=WAIT)
        body = {"name": "dense", "directory": str(directories["dense"])}
        answer = client.post("/models", json=body, headers=key)
        assert answer.status_code == 200, answer.text
        assert answer.json()["replaced"] == str(directories["dense"])
        old, new = open_stand_in.opened
        assert embed(client).status_code == 200  # of the new one
        assert not old.model.closed and len(new.model.calls) > len(old.model.calls) - 2
        gate.open.set()
        assert waiting.result().status_code == 200
    end = time.monotonic() + WAIT
    while not old.model.closed:
        assert time.monotonic() < end
        time.sleep(0.005)
    body = {"name": "labels", "directory": str(directories["labels"])}
    assert client.post("/models", json=body, headers=key).json()["models"] == ["dense", "labels"]
    assert client.post("/predict", json={"inputs": "a"}).status_code == 200


def test_models_are_exchanged_with_the_admins_key_alone(serve, monkeypatch) -> None:
    from bertile import text

    body = {"name": "dense", "directory": "/nowhere"}
    assert serve("dense").post("/models", json=body).status_code == 403
    client = serve("dense", admin_key="boss")
    key = {"authorization": "Bearer boss"}

    def fail(*_: Any, **__: Any) -> Any:
        raise BundleError("/nowhere is no bundle")

    monkeypatch.setattr(text, "open", fail)
    answer = client.post("/models", json=body, headers=key)
    assert answer.status_code == 422 and "is no bundle" in answer.json()["error"]
    answer = client.post("/models", json={**body, "name": "v1"}, headers=key)
    assert answer.status_code == 422 and "'v1'" in answer.json()["error"]
    assert embed(client).status_code == 200


def test_many_clients_get_the_answers_of_their_own_texts(serve, original) -> None:
    client = serve("dense")
    texts = [f"{document} {number}" for document in DOCUMENTS for number in (1, 3, 8, 99, 1998)]
    want = original.encode(texts, normalize_embeddings=True)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda text: embed(client, text).json()[0], texts))
    np.testing.assert_allclose(answers, want, rtol=0, atol=2e-5)


def test_metrics_have_the_originals_names(serve) -> None:
    client = serve("dense", "labels")
    assert embed(client).status_code == embed(client, ["a", "b"]).status_code == 200
    assert client.post("/predict", json={"inputs": "a"}).status_code == 200
    assert embed(client, "").status_code == 400
    counted = {
        "te_request_count": 3,
        "te_request_success": 3,
        "te_request_failure": 1,
        "te_embed_count": 3,
        "te_predict_success": 1,
        "te_request_duration_count": 3,
        "te_request_tokenization_duration_count": 3,
        "te_request_queue_duration_count": 3,
        "te_request_inference_duration_count": 3,
        "te_queue_size": 0,
        "bertile_requests_in_house": 0,
    }
    assert {name: value(client, name) for name in counted} == counted
    assert value(client, "te_request_input_length_count") >= 4
    assert value(client, "te_batch_next_size_sum") == value(client, "te_request_input_length_count")
    text = client.get("/metrics").text
    assert 'te_request_count{method="batch",model="dense"} 1.0' in text
    assert 'te_request_failure{err="validation",model="dense"} 1.0' in text


def test_each_request_is_a_line_of_the_log(serve, capfd) -> None:
    client = serve("dense", quiet=False)
    embed(client, ["the cat", "a"], headers={"x-request-id": "mine"})
    embed(client, "")
    client.__exit__()
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if "{" in line[:1]]
    assert [line["status"] for line in lines] == [200, 400]
    assert lines[0]["id"] == "mine" and lines[0]["path"] == "/embed"
    assert (lines[0]["model"], lines[0]["texts"], lines[0]["tokens"]) == ("dense", 2, 7)
    assert lines[1]["error"] == "`inputs` cannot be empty" and len(lines[1]["id"]) == 16


def test_browser_of_another_origin_may_ask_where_that_is_said(serve) -> None:
    origin = {"Origin": "https://pages.example"}
    asking = {**origin, "Access-Control-Request-Method": "POST"}
    allowed = "access-control-allow-origin"
    open_, closed = serve("dense", cors_allow_origin=["https://pages.example"]), serve("dense")
    assert open_.options("/embed", headers=asking).headers[allowed] == origin["Origin"]
    assert open_.post("/embed", json={"inputs": "a"}, headers=origin).headers[allowed]
    other = open_.options("/embed", headers={**asking, "Origin": "https://other.example"})
    assert other.status_code == 400 and allowed not in other.headers
    assert allowed not in closed.post("/embed", json={"inputs": "a"}, headers=origin).headers


def test_page_of_routes_describes_them(serve) -> None:
    client = serve("dense")
    document = client.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    embed_ = document["paths"]["/embed"]["post"]
    assert {"200", "400", "401", "413", "415", "422", "424", "429", "504"} <= set(
        embed_["responses"]
    )
    reference = embed_["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    schema = document["components"]["schemas"][reference.rpartition("/")[2]]
    assert schema["required"] == ["inputs"] and schema["properties"]["inputs"]["examples"]
    page = client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert all(path in page.text for path in document["paths"])
    assert "src=" not in page.text and "https:" not in page.text  # it needs no other host
