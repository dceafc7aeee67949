"""Answers on Cohere's routes for ranking, as its clients ask and read."""

from __future__ import annotations

import uuid
from typing import Any

from bertile.server import errors, schemas
from bertile.server.call import Call
from bertile.server.endpoint import ASKING, COHERE, Route
from bertile.server.errors import Refusal
from bertile.server.service import Service
from bertile.server.tei import ranked


async def rerank(service: Service, call: Call, request: schemas.CohereRequest) -> Any:
    """The documents by how well they answer the query, the best first."""
    documents = request.documents
    if not documents:
        raise Refusal(errors.EMPTY, "`documents` cannot be empty", param="documents")
    texts = [text if isinstance(text, str) else text.text for text in documents]
    call.method = "batch"
    results = []
    for index, score, text in (await ranked(service, call, request.model, request, texts))[
        : request.top_n
    ]:
        results.append({"index": index, "relevance_score": score})
        if request.return_documents:
            results[-1]["document"] = {"text": text}
    tokens = call.work.tokens
    version = call.scope["path"].split("/")[1].removeprefix("v")
    return {
        "id": str(uuid.uuid4()),
        "results": results,
        "meta": {"api_version": {"version": version}, "billed_units": {"search_units": 1}},
        "model": call.served.name,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


ROUTES = tuple(
    Route(
        "POST",
        path,
        rerank,
        schemas.CohereRequest,
        schemas.CohereRanks,
        COHERE,
        "Documents by how well they answer a query, as Cohere's clients ask",
        refusals=(*ASKING, errors.WRONG_MODEL, errors.UNKNOWN_MODEL),
    )
    for path in ("/v1/rerank", "/v2/rerank")
)
