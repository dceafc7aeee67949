"""Answers on OpenAI's routes for embeddings and models, as its clients ask and read."""

from __future__ import annotations

from base64 import b64encode
from typing import Any

import numpy as np

from bertile.server import errors, schemas
from bertile.server.call import Call
from bertile.server.catalogue import DENSE, Served
from bertile.server.endpoint import ASKING, OPENAI, Route
from bertile.server.service import Service
from bertile.server.tei import NO_EMBEDDING, choose, dense_steps, listed


async def embeddings(service: Service, call: Call, request: schemas.OpenAIRequest) -> Any:
    """A vector of length 1 of each text."""
    served = choose(service, call, request.model, (DENSE,), NO_EMBEDDING)
    texts = listed(service, call, request.input, "input")
    steps = dense_steps(service, served, request, request.dimensions or None, True)
    vectors = await service.ask(call, texts, steps)
    if request.encoding_format == "base64":
        vectors = [b64encode(np.ascontiguousarray(v, "<f4").data).decode() for v in vectors]
    tokens = call.work.tokens
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "embedding": vector, "index": index}
            for index, vector in enumerate(vectors)
        ],
        "model": served.name,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


async def models(service: Service, call: Call, request: None) -> Any:
    """All models that are served."""
    return {"object": "list", "data": [_model(served) for served in service.models]}


async def model(service: Service, call: Call, request: None) -> Any:
    """A model, by the name that it is served under."""
    return _model(service.models.find(call.path_params["name"]))


def _model(served: Served) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.loaded,
        "owned_by": "bertile",
    }


_EMBEDDINGS = [
    Route(
        "POST",
        path,
        embeddings,
        schemas.OpenAIRequest,
        schemas.OpenAIEmbeddings,
        OPENAI,
        "A vector of each text, as OpenAI's clients ask",
        refusals=(*ASKING, errors.WRONG_MODEL, errors.UNKNOWN_MODEL),
        hidden=path != "/v1/embeddings",
    )
    for path in ("/v1/embeddings", "/embeddings")
]
ROUTES = (
    *_EMBEDDINGS,
    Route("GET", "/v1/models", models, None, schemas.OpenAIModels, OPENAI, "What is served"),
    Route(
        "GET",
        "/v1/models/{name:path}",
        model,
        None,
        schemas.OpenAIModel,
        OPENAI,
        "A model that is served",
        refusals=(errors.UNKNOWN_MODEL,),
        path_params={"name": "a name of /v1/models"},
    ),
)
