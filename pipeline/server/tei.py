"""Answers on the routes of Text Embeddings Inference, with its fields, limits and words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from bertile.server import errors, schemas
from bertile.server.call import Call
from bertile.server.catalogue import (
    CLASSIFIER,
    DENSE,
    OTHER,
    RERANKER,
    SPARSE,
    TOKENS,
    Served,
)
from bertile.server.endpoint import ASKING, TEI, Reply, Route, checked
from bertile.server.errors import Refusal
from bertile.server.service import Service
from bertile.text import similarities
from bertile.text.tokens import Ids

NO_EMBEDDING = "Model is not an embedding model"
NO_SPARSE = "Model is not an embedding model with SPLADE pooling"
NO_CLASSIFIER = "Model is not a classifier model"
NO_RERANKER = "model is not a re-ranker model"
NO_TOKENS = "Model has a vector for a text, and none for its tokens; compile it with --head encoder"
SPARSE_ALL = "`embed_all` is not available for SPLADE models"
SPARSE_NORMAL = "`normalize` is not available for SPLADE models"


async def embed(service: Service, call: Call, request: schemas.EmbedRequest) -> Any:
    """A vector of each text."""
    served = choose(service, call, call.model, (DENSE, SPARSE), NO_EMBEDDING)
    texts = listed(service, call, request.inputs)
    if served.kind == SPARSE:
        if request.normalize:
            raise Refusal(errors.WRONG_MODEL, f"Backend error: {SPARSE_NORMAL}")
        steps = served.steps(request.prompt_name, **cutting(service, request))
        vectors = await service.ask(call, texts, steps)
        return [vector.dense() for vector in vectors]
    steps = dense_steps(service, served, request, request.dimensions, request.normalize)
    return await service.ask(call, texts, steps)


async def embed_all(service: Service, call: Call, request: schemas.EmbedAllRequest) -> Any:
    """A vector of each token of each text."""
    served = choose(service, call, call.model, (TOKENS, DENSE, SPARSE), NO_EMBEDDING)
    if served.kind != TOKENS:
        otherwise = SPARSE_ALL if served.kind == SPARSE else NO_TOKENS
        served = choose(service, call, call.model, (TOKENS,), otherwise)
    texts = listed(service, call, request.inputs)
    steps = served.steps(request.prompt_name, **cutting(service, request))
    return await service.ask(call, texts, steps)


async def embed_sparse(service: Service, call: Call, request: schemas.EmbedSparseRequest) -> Any:
    """The weights of each text that are not zero."""
    served = choose(service, call, call.model, (SPARSE,), NO_SPARSE)
    texts = listed(service, call, request.inputs)
    steps = served.steps(request.prompt_name, **cutting(service, request))
    vectors = await service.ask(call, texts, steps)
    return [
        [
            {"index": index, "value": value}
            for index, value in zip(vector.indices.tolist(), vector.values)
        ]
        for vector in vectors
    ]


async def rerank(service: Service, call: Call, request: schemas.RerankRequest) -> Any:
    """The texts by how well they answer the query, the best first."""
    if not request.texts:
        raise Refusal(errors.EMPTY, "`texts` cannot be empty", param="texts")
    scores = await ranked(service, call, call.model, request, request.texts)
    return [
        {"index": index, "score": score, **({"text": text} if request.return_text else {})}
        for index, score, text in scores
    ]


async def ranked(
    service: Service, call: Call, model: str | None, request: Any, texts: Sequence[str]
) -> list[tuple[int, float, str]]:
    """(place in the list, score, text), the best first; `request` has the query and what is cut.

    Scores are the sigmoid of logits, or these, where the request wants raw scores.
    """
    served = choose(service, call, model, (RERANKER,), NO_RERANKER)
    pairs = limited(service, call, [(request.query, text) for text in texts])
    function = "none" if getattr(request, "raw_scores", False) else "sigmoid"
    # a pair has no prompt there
    steps = served.steps(prompted=False, function=function, **cutting(service, request))
    scores = np.concatenate(await service.ask(call, pairs, steps, "predict"))
    if np.isnan(scores).any():
        raise Refusal(errors.BACKEND, "score is NaN")
    order = np.argsort(-scores, kind="stable").tolist()
    return [(index, scores[index], texts[index]) for index in order]


async def predict(service: Service, call: Call, request: schemas.PredictRequest) -> Any:
    """The labels of a text or a pair with their scores, the best first; of a list, of each."""
    served = choose(service, call, call.model, (CLASSIFIER, RERANKER), NO_CLASSIFIER)
    inputs = request.inputs
    single = isinstance(inputs, str) or (bool(inputs) and isinstance(inputs[0], str))
    texts = [_sequence(inputs)] if single else [_sequence(text) for text in inputs]
    if not single:
        call.method = "batch"
    texts = limited(service, call, texts)
    model = served.model
    scored = model.settings.scores if served.kind == CLASSIFIER else "sigmoid"
    function = "none" if request.raw_scores else scored
    paired = any(isinstance(text, tuple) for text in texts)
    steps = served.steps(prompted=not paired, function=function, **cutting(service, request))
    rows = await service.ask(call, texts, steps, "predict")
    if any(np.isnan(row).any() for row in rows):
        raise Refusal(errors.BACKEND, "score is NaN")
    answers = [
        [
            {"score": row[index], "label": model.label(index)}
            for index in np.argsort(-row, kind="stable").tolist()
        ]
        for row in rows
    ]
    return answers[0] if single else answers


def _sequence(text: str | list[str]) -> str | tuple[str, str]:
    if isinstance(text, str):
        return text
    return text[0] if len(text) == 1 else (text[0], text[1])


async def similarity(service: Service, call: Call, request: schemas.SimilarityRequest) -> Any:
    """The cosine of a sentence's vector and of each other's."""
    sentences = request.inputs.sentences
    if not sentences:
        raise Refusal(errors.EMPTY, "`inputs.sentences` cannot be empty", param="inputs")
    served = choose(service, call, call.model, (DENSE,), NO_EMBEDDING)
    texts = limited(service, call, [request.inputs.source_sentence, *sentences])
    parameters = request.parameters or schemas.Prompted()
    steps = dense_steps(service, served, parameters, None, False)
    vectors = np.stack(await service.ask(call, texts, steps))
    return similarities.between_all("cosine", vectors[0], vectors[1:])[0]


async def tokenize(service: Service, call: Call, request: schemas.TokenizeRequest) -> Any:
    """The tokens of each text."""
    served = choose(service, call, call.model)
    inputs = request.inputs
    texts = [inputs] if isinstance(inputs, str) else check_count(service, call, inputs)
    return await service.beside(_tokens, served, texts, request)


def _tokens(served: Served, texts: Sequence[str], request: schemas.TokenizeRequest) -> Any:
    try:
        before = served.prompt(request.prompt_name)
        texts = [before + text for text in texts]
        tokenizer = served.model.tokenizer
        encodings = tokenizer.encode_batch(texts, add_special_tokens=request.add_special_tokens)
    except Exception as error:  # of a tokenizer: any
        raise errors.of_preparing(error) from error
    return [_simple(text, encoding) for text, encoding in zip(texts, encodings)]


def _simple(text: str, encoding: Any) -> list[dict[str, Any]]:
    """The tokens of a text, with the places of their bytes."""
    plain = text.isascii()
    tokens = []
    for token, number, special, (start, stop) in zip(
        encoding.tokens, encoding.ids, encoding.special_tokens_mask, encoding.offsets
    ):
        if special:
            tokens.append(
                {"id": number, "text": token, "special": True, "start": None, "stop": None}
            )
            continue
        piece = text[start:stop]
        if not plain:
            start = len(text[:start].encode())
            stop = start + len(piece.encode())
        tokens.append({"id": number, "text": piece, "special": False, "start": start, "stop": stop})
    return tokens


async def decode(service: Service, call: Call, request: schemas.DecodeRequest) -> Any:
    """The text of each list of ids."""
    served = choose(service, call, call.model)
    ids = request.ids
    rows = ids if ids and isinstance(ids[0], list) else [ids]
    rows = check_count(service, call, rows if ids else [], "ids")
    return await service.beside(
        served.model.tokenizer.decode_batch, rows, request.skip_special_tokens
    )


async def info(service: Service, call: Call, request: None) -> Any:
    """What is served, and its limits."""
    served, settings = service.models.choose(call.model), service.settings
    manifest, described = served.manifest, served.described()
    labels = [served.model.label(index) for index in range(served.labels)]
    classes = {
        "id2label": {str(index): label for index, label in enumerate(labels)},
        "label2id": {label: index for index, label in enumerate(labels)},
    }
    kinds = {
        CLASSIFIER: {"classifier": classes},
        RERANKER: {"reranker": classes},
        OTHER: {"other": {"head": manifest["model"]["head"]}},
    }
    pooling = served.model.settings.pooling
    embedding = {"pooling": _POOLINGS.get(pooling, pooling)}
    return {
        "model_id": served.source,
        "model_sha": manifest["model"].get("sha256"),
        "model_dtype": _DTYPES.get(described["precision"], described["precision"]),
        "served_model_name": served.name,
        "model_type": kinds.get(served.kind, {"embedding": embedding}),
        "max_concurrent_requests": settings.max_concurrent_requests,
        "max_input_length": served.model.max_seq_length or 0,
        "max_batch_tokens": served.max_batch_tokens,
        "max_batch_requests": None,
        "max_client_batch_size": settings.max_client_batch_size,
        "auto_truncate": settings.auto_truncate,
        "tokenization_workers": 2,
        "sha": None,
        "docker_label": None,
        **described,
        "models": [other.name for other in service.models],
    }


# TEI's words, where they are others than ours, or sentence-transformers'.
_POOLINGS = {"lasttoken": "last_token"}
_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


async def health(service: Service, call: Call, request: None) -> Any:
    """Whether requests are answered."""
    if service.stopping or not len(service.models):
        raise Refusal(errors.UNHEALTHY, "unhealthy")
    return Reply(b"")


async def metrics(service: Service, call: Call, request: None) -> Any:
    """What Prometheus reads."""
    accept = call.headers.get(b"accept", b"").decode("latin-1")
    body, content_type = service.metrics.page(accept)
    return Reply(body, content_type.encode())


async def alias(service: Service, call: Call, request: None) -> Any:
    """What the first model is for, on TEI's route without a name."""
    served = choose(service, call, call.model)
    takes, answer = _ALIASES.get(served.kind, _ALIASES[DENSE])
    call.check_json()
    return await answer(service, call, checked(takes, call.body))


_ALIASES = {
    DENSE: (TypeAdapter(schemas.EmbedRequest), embed),
    SPARSE: (TypeAdapter(schemas.EmbedSparseRequest), embed_sparse),
    TOKENS: (TypeAdapter(schemas.EmbedAllRequest), embed_all),
    CLASSIFIER: (TypeAdapter(schemas.PredictRequest), predict),
    RERANKER: (TypeAdapter(schemas.RerankRequest), rerank),
}


def choose(
    service: Service,
    call: Call,
    model: str | None,
    kinds: Sequence[str] = (),
    otherwise: str = "",
) -> Served:
    """The model that answers a call; Refusal where there is none of these kinds."""
    served = call.served = service.models.choose(model, kinds, otherwise)
    return served


def listed(service: Service, call: Call, inputs: Any, name: str = "inputs") -> list[Any]:
    """The texts of a field of this `name` that is a text, ids, or a list of such."""
    if isinstance(inputs, str):
        texts: list[Any] = [inputs]
    elif inputs and isinstance(inputs[0], int):
        texts = [Ids(inputs)]
    else:
        call.method = "batch"
        texts = [text if isinstance(text, str) else Ids(text) for text in inputs]
    return limited(service, call, texts, name)


def limited(service: Service, call: Call, texts: list[Any], name: str = "inputs") -> list[Any]:
    """The texts, if there are some, not too many, and none is empty; else Refusal."""
    if len(texts) != 1:
        check_count(service, call, texts, name)
    for text in texts:
        if not (any(text) if isinstance(text, tuple) else text):
            raise Refusal(errors.EMPTY, f"`{name}` cannot be empty", param=name)
    return texts


def check_count(service: Service, call: Call, texts: list[Any], name: str = "inputs") -> list[Any]:
    """The texts of a list, which is a batch; Refusal for none and for too many."""
    call.method = "batch"
    most = service.settings.max_client_batch_size
    if not texts:
        raise Refusal(errors.EMPTY, f"`{name}` cannot be empty", param=name)
    if len(texts) > most:
        raise Refusal(
            errors.TOO_MANY, f"batch size {len(texts)} > maximum allowed batch size {most}"
        )
    return texts


def cutting(service: Service, request: Any) -> dict[str, Any]:
    """What of a model's steps a request says of texts that are too long."""
    truncate = getattr(request, "truncate", None)
    side = getattr(request, "truncation_direction", None)
    return {
        "truncate": service.settings.auto_truncate if truncate is None else truncate,
        "side": side.lower() if side else None,
    }


def dense_steps(
    service: Service, served: Served, request: Any, dimensions: int | None, normalize: bool
) -> Any:
    """The steps of a request for vectors; Refusal for more dimensions than there are."""
    if dimensions is not None and dimensions > served.dimensions:
        raise Refusal(
            errors.INVALID,
            "Input validation error: `dimensions` should be smaller than the maximum embedding"
            " dimension.",
            param="dimensions",
        )
    return served.steps(
        getattr(request, "prompt_name", None),
        normalize_embeddings=normalize,
        truncate_dim=dimensions,
        **cutting(service, request),
    )


def _asks(
    path: str, answer: Any, takes: Any, gives: Any, summary: str, *more: errors.Kind
) -> Route:
    refusals = (*ASKING, errors.WRONG_MODEL, *more)
    return Route("POST", path, answer, takes, gives, TEI, summary, named=True, refusals=refusals)


_BESIDE = (errors.EMPTY, errors.TOO_MANY, errors.WRONG_FORM, errors.INVALID, errors.OVERLOADED)
_EMBED_ALL = "A vector of each token"
ROUTES = (
    _asks("/embed", embed, schemas.EmbedRequest, schemas.Vectors, "A vector of each text"),
    _asks("/embed_all", embed_all, schemas.EmbedAllRequest, schemas.VectorsOfTokens, _EMBED_ALL),
    _asks(
        "/embed_sparse",
        embed_sparse,
        schemas.EmbedSparseRequest,
        schemas.SparseVectors,
        "The weights of each text that are not zero",
    ),
    _asks(
        "/rerank",
        rerank,
        schemas.RerankRequest,
        schemas.Ranks,
        "Texts by how well they answer a query",
    ),
    _asks(
        "/predict",
        predict,
        schemas.PredictRequest,
        schemas.Predictions,
        "Labels and their scores",
    ),
    _asks(
        "/similarity",
        similarity,
        schemas.SimilarityRequest,
        schemas.Similarities,
        "How alike a sentence is to others",
    ),
    Route(
        "POST",
        "/tokenize",
        tokenize,
        schemas.TokenizeRequest,
        schemas.Tokens,
        TEI,
        "The tokens of each text",
        named=True,
        refusals=_BESIDE,
    ),
    Route(
        "POST",
        "/decode",
        decode,
        schemas.DecodeRequest,
        schemas.Texts,
        TEI,
        "The text of each list of ids",
        named=True,
        refusals=_BESIDE,
    ),
    Route("GET", "/info", info, None, schemas.Info, TEI, "What is served", named=True),
    Route(
        "GET",
        "/health",
        health,
        None,
        None,
        TEI,
        "Whether requests are answered",
        key="",
        refusals=(errors.UNHEALTHY,),
    ),
    Route(
        "GET",
        "/ping",
        health,
        None,
        None,
        TEI,
        "The same, by Sagemaker's name",
        key="",
        refusals=(errors.UNHEALTHY,),
    ),
    Route(
        "GET",
        "/metrics",
        metrics,
        None,
        str,
        TEI,
        "What Prometheus reads",
        key="",
        content_type="text/plain",
    ),
    # what they take is as the first model is: not on the page of routes
    Route("POST", "/", alias, None, None, TEI, "", named=True, hidden=True),
    Route("POST", "/invocations", alias, None, None, TEI, "", hidden=True),
)
