"""Clients that others have written get from the server what the original libraries give."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.server_at_port import at_port

pytestmark = pytest.mark.slow
TEXTS = ["The cat sat on the mat.", "a", "Zoë lives in New York, not in Berlin!"]
DOCUMENTS = ["the old film", "paris was very good", "a cat"]
QUERY = "What was the old film?"
WHY = "which is what is asked"


@pytest.fixture
def url(directories: dict[str, Path], open_stand_in: Any) -> Iterator[Callable[..., str]]:
    """Where a server of these kinds of models is."""
    from bertile.server.application import application
    from bertile.server.settings import Settings

    with contextlib.ExitStack() as stack:

        def start(*names: str, **settings: Any) -> str:
            chosen = Settings(**{"max_batch_tokens": 512, "quiet": True, **settings})
            app = application({name: directories[name] for name in names}, chosen)
            return f"http://127.0.0.1:{stack.enter_context(at_port(app))}"

        yield start


@pytest.fixture(scope="module")
def wanted(original: Any) -> np.ndarray:
    """The vectors of TEXTS, of length 1."""
    return original.encode(TEXTS, normalize_embeddings=True)


@pytest.fixture(scope="module")
def scores(directories: dict[str, Path]) -> np.ndarray:
    """How well DOCUMENTS answer QUERY."""
    from sentence_transformers import CrossEncoder

    return CrossEncoder(str(directories["score"])).predict([(QUERY, text) for text in DOCUMENTS])


def same(vectors: Any, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(np.asarray(vectors, np.float32), wanted, atol=2e-5)


def test_tei_client_embeds(url: Any, wanted: np.ndarray, original: Any) -> None:
    tei_client = pytest.importorskip("tei_client", reason=WHY)
    client = tei_client.HttpClient(url("dense"))
    assert client.health()
    same(client.embed(TEXTS), wanted)
    same(client.embed(TEXTS[0]), wanted[:1])
    same(client.embed(TEXTS, normalize=False), original.encode(TEXTS))
    prompted = original.encode(TEXTS, prompt_name="query", normalize_embeddings=True)
    same(client.embed(TEXTS, prompt_name="query"), prompted)
    ids = client.tokenize(TEXTS[0])[0].get_ids()
    assert ids == original.tokenizer(TEXTS[0])["input_ids"]
    same(client.embed([ids]), wanted[:1])


def test_tei_client_reads_what_is_served(url: Any) -> None:
    tei_client = pytest.importorskip("tei_client", reason=WHY)
    for kind, name in (("dense", "embedding"), ("labels", "classifier"), ("score", "reranker")):
        info = tei_client.HttpClient(url(kind)).info()
        assert info.server_model_type.value == name and info.max_client_batch_size == 32
    assert set(tei_client.HttpClient(url("dense")).prompt_names()) >= {"query", "passage"}


def test_tei_client_reranks_and_classifies(url: Any, scores: np.ndarray) -> None:
    tei_client = pytest.importorskip("tei_client", reason=WHY)
    ranks = tei_client.HttpClient(url("score")).rerank(QUERY, DOCUMENTS).ranks
    assert [rank.index for rank in ranks] == np.argsort(-scores).tolist()
    same([rank.score for rank in ranks], np.sort(scores)[::-1])
    results = tei_client.HttpClient(url("labels")).classify(TEXTS)
    for result in results:
        labels = [score.label for score in result.scores]
        assert sorted(labels) == ["contradiction", "entailment", "neutral"]
        assert sum(score.score for score in result.scores) == pytest.approx(1, abs=1e-5)


def test_hugging_face_client(url: Any, wanted: np.ndarray) -> None:
    hub = pytest.importorskip("huggingface_hub", reason=WHY)
    client = hub.InferenceClient(url("dense"))
    same(client.feature_extraction(TEXTS[0], normalize=True), wanted[:1])
    same(client.feature_extraction(TEXTS), wanted)  # as LangChain's HuggingFaceEndpointEmbeddings
    client = hub.InferenceClient(f"{url('dense')}/similarity")
    similarity = client.sentence_similarity(TEXTS[0], other_sentences=TEXTS[1:])
    same(similarity, wanted[1:] @ wanted[0])


def test_openai_client(url: Any, wanted: np.ndarray) -> None:
    openai = pytest.importorskip("openai", reason=WHY)
    client = openai.OpenAI(base_url=f"{url('dense', 'score')}/v1", api_key="a key", max_retries=0)
    for more in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
        answer = client.embeddings.create(input=TEXTS, model="dense", **more)
        vectors = [entry.embedding for entry in answer.data]
        if more.get("encoding_format") == "base64":
            import base64

            vectors = [np.frombuffer(base64.b64decode(text), "<f4") for text in vectors]
        same(vectors, wanted)
        assert answer.model == "dense" and answer.usage.prompt_tokens > len(TEXTS)
    short = client.embeddings.create(input=TEXTS[0], model="dense", dimensions=8).data[0].embedding
    assert np.linalg.norm(short) == pytest.approx(1, abs=1e-5) and len(short) == 8
    assert [model.id for model in client.models.list()] == ["dense", "score"]
    assert client.models.retrieve("score").id == "score"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.embeddings.create(input="a", model="none")
    with pytest.raises(openai.BadRequestError):
        client.embeddings.create(input="a", model="dense", dimensions=10**6)


def test_openai_client_shows_its_key(url: Any) -> None:
    openai = pytest.importorskip("openai", reason=WHY)
    base_url = f"{url('dense', api_key='right')}/v1"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=base_url, api_key="wrong").models.list()
    assert list(openai.OpenAI(base_url=base_url, api_key="right").models.list())


def test_infinity_client(url: Any, wanted: np.ndarray, scores: np.ndarray) -> None:
    infinity = pytest.importorskip("infinity_client", reason=WHY)
    from infinity_client.api.default import embeddings, rerank
    from infinity_client.models import OpenAIEmbeddingInputText, RerankInput

    client = infinity.Client(base_url=f"{url('dense', 'score')}/v1")
    body = OpenAIEmbeddingInputText(input_=TEXTS, model="dense")
    answer = embeddings.sync(client=client, body=body)
    same([entry.embedding for entry in answer.data], wanted)
    body = RerankInput(query=QUERY, documents=DOCUMENTS, model="score", return_documents=True)
    answer = rerank.sync(client=client, body=body)
    assert [entry.index for entry in answer.results] == np.argsort(-scores).tolist()
    same([entry.relevance_score for entry in answer.results], np.sort(scores)[::-1])


def test_cohere_client(url: Any, scores: np.ndarray) -> None:
    cohere = pytest.importorskip("cohere", reason=WHY)
    place = url("score")
    for client in (
        cohere.Client(api_key="a key", base_url=place),
        cohere.ClientV2(api_key="a key", base_url=place),
    ):
        answer = client.rerank(query=QUERY, documents=DOCUMENTS, model="score", top_n=2)
        assert [entry.index for entry in answer.results] == np.argsort(-scores)[:2].tolist()
        same([entry.relevance_score for entry in answer.results], np.sort(scores)[:0:-1])


@pytest.mark.parametrize("binary", [True, False])
def test_triton_client(url: Any, original: Any, binary: bool) -> None:
    triton = pytest.importorskip("tritonclient.http", reason=WHY)
    place = url("dense").removeprefix("http://")
    with contextlib.closing(triton.InferenceServerClient(place)) as client:
        assert client.is_server_live() and client.is_server_ready()
        assert client.is_model_ready("dense") and client.is_model_ready("dense", "1")
        assert not client.is_model_ready("none")
        assert client.get_server_metadata()["name"] == "bertile"
        (spec,) = client.get_model_metadata("dense")["outputs"]
        text = triton.InferInput("text", [len(TEXTS), 1], "BYTES")
        array = np.array([[word.encode()] for word in TEXTS], object)
        text.set_data_from_numpy(array, binary_data=binary)
        output = triton.InferRequestedOutput(spec["name"], binary_data=binary)
        answer = client.infer("dense", [text], outputs=[output], request_id="7")
        same(answer.as_numpy(spec["name"]), original.encode(TEXTS))
        assert answer.get_response()["id"] == "7"
        rows = original.tokenizer(TEXTS, padding=True, return_tensors="np")
        inputs = []
        for name in ("input_ids", "attention_mask"):
            inputs.append(triton.InferInput(name, list(rows[name].shape), "INT64"))
            inputs[-1].set_data_from_numpy(rows[name].astype(np.int64), binary_data=binary)
        same(client.infer("dense", inputs).as_numpy(spec["name"]), original.encode(TEXTS))
        with pytest.raises(Exception, match="does not exist"):
            client.infer("none", [text])


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_triton_client_sends_less(url: Any, original: Any, algorithm: str) -> None:
    triton = pytest.importorskip("tritonclient.http", reason=WHY)
    with contextlib.closing(
        triton.InferenceServerClient(url("dense").removeprefix("http://"))
    ) as client:
        text = triton.InferInput("text", [1], "BYTES")
        text.set_data_from_numpy(np.array([TEXTS[0].encode()], object))
        answer = client.infer("dense", [text], request_compression_algorithm=algorithm)
        same(answer.as_numpy("sentence_embedding"), original.encode(TEXTS[:1]))


def test_llama_index(url: Any, wanted: np.ndarray, scores: np.ndarray) -> None:
    module = pytest.importorskip("llama_index.embeddings.text_embeddings_inference", reason=WHY)
    model = module.TextEmbeddingsInference(model_name="a model", base_url=url("dense"))
    same(model.get_text_embedding_batch(TEXTS), wanted)
    same(model.get_query_embedding(TEXTS[0]), wanted[0])


def test_llama_index_reranks(url: Any, scores: np.ndarray) -> None:
    module = pytest.importorskip("llama_index.postprocessor.tei_rerank", reason=WHY)
    from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

    reranker = module.TextEmbeddingInference(base_url=url("score"))
    nodes = [NodeWithScore(node=TextNode(text=text), score=0.0) for text in DOCUMENTS]
    ranked = reranker.postprocess_nodes(nodes, QueryBundle(QUERY))
    assert [node.text for node in ranked] == [DOCUMENTS[i] for i in np.argsort(-scores)]


def test_chroma(url: Any, wanted: np.ndarray) -> None:
    functions = pytest.importorskip("chromadb.utils.embedding_functions", reason=WHY)
    function = functions.HuggingFaceEmbeddingServer(f"{url('dense')}/embed")
    same(function(TEXTS), wanted)


def test_embed_parity(stages: str, tmp_path: Path) -> None:
    """Of MiniLM's true weights: those of a tiny model have ties among neighbours."""
    pytest.importorskip("embed_parity", reason=WHY)
    from bertile import driver
    from bertile.config import Config
    from bertile.export import files
    from bertile.studies.serving_processes import start_bertile

    directory, bundle = str(files.find_directory("minilm")), tmp_path / "minilm"
    driver.compile(directory, bundle, Config(precision="fp32", cache_dir=stages))
    with start_bertile(bundle) as server:
        command = [sys.executable, "-m", "embed_parity.cli", "compare", "--device", "cpu"]
        command += ["--model", directory, "--tei", f"http://127.0.0.1:{server.port}"]
        command += ["--dtype", "float32", "--lengths", "8,16,32,64,128,256"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
