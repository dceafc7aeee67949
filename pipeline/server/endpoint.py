"""Answers the requests of a route: checks, reads, has them answered, sends, measures and logs."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson
from pydantic import BaseModel, TypeAdapter, ValidationError

from bertile.server import errors, schemas
from bertile.server.call import Call, Receive
from bertile.server.errors import Kind, Refusal
from bertile.server.request_log import RequestLog
from bertile.server.service import Service
from bertile.server.tracing import Tracing

LOG = logging.getLogger("bertile")
Send = Callable[[dict[str, Any]], Awaitable[None]]
JSON = b"application/json"
# Python's json writes what is no number as NaN, which is no JSON; orjson writes null.
NUMBERS = orjson.OPT_SERIALIZE_NUMPY
MESSAGES = 3  # of what is wrong with a body


class Protocol(NamedTuple):
    """How a family of clients reads errors: the tag of its routes, an error's body and schema."""

    tag: str
    error: Callable[[Refusal], dict[str, Any]]
    schema: Any
    openai_statuses: bool = False

    def status(self, kind: Kind) -> int:
        """The status code of a reason."""
        return (self.openai_statuses and kind.openai_status) or kind.status


TEI = Protocol("Text Embeddings Inference", errors.of_tei, schemas.TeiError)
OPENAI = Protocol("OpenAI", errors.of_openai, schemas.OpenAIError, openai_statuses=True)
COHERE = Protocol("Cohere", errors.of_cohere, schemas.CohereError)
KSERVE = Protocol("KServe", errors.of_kserve, schemas.KServeError)
SERVER = Protocol("this server", errors.of_tei, schemas.TeiError)


class Reply(NamedTuple):
    """An answer that is no plain JSON: bytes, their type, status and further headers."""

    body: bytes
    content_type: bytes = JSON
    status: int = 200
    headers: tuple[tuple[bytes, bytes], ...] = ()


Answer = Callable[[Service, Call, Any], Awaitable[Any]]
# Of routes that run a model.
ASKING = (
    errors.EMPTY,
    errors.TOO_MANY,
    errors.WRONG_FORM,
    errors.INVALID,
    errors.BACKEND,
    errors.OVERLOADED,
    errors.EXPIRED,
)


@dataclass(frozen=True)
class Route:
    """A row of the table of routes.

    `answer(service, call, request)` gives what goes out as JSON, numpy arrays in it, or a Reply.
    `takes` is the schema of a body, None where the route reads `call.body` itself or has none,
    `gives` that of an answer. `key` is whose it takes: "api", "admin" or "" for nobody's. A route
    that is `named` is there again below each model's name. `refusals` are the reasons of a refusal
    that the page of routes names, `shows` the schema there of a body that the route reads itself.
    """

    method: str
    path: str
    answer: Answer
    takes: type[BaseModel] | None
    gives: Any
    protocol: Protocol
    summary: str
    key: str = "api"
    named: bool = False
    refusals: tuple[Kind, ...] = ()
    hidden: bool = False
    content_type: str = "application/json"
    path_params: Mapping[str, str] = field(default_factory=dict)
    shows: type[BaseModel] | None = None

    @property
    def body(self) -> type[BaseModel] | None:
        """The schema of its body on the page of routes."""
        return self.takes or self.shows


class Endpoint:
    """A route as an ASGI application."""

    def __init__(
        self,
        route: Route,
        service: Service,
        log: RequestLog | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self.route, self._service, self._log, self._tracing = route, service, log, tracing
        self._adapter = TypeAdapter(route.takes) if route.takes is not None else None
        settings = service.settings
        self._key = {"api": settings.api_key, "admin": settings.admin_key, "": None}[route.key]
        self._reads = route.method == "POST"

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        call = Call(scope, receive)
        refusal = None
        try:
            call.check_key(self._key)
            if self._reads:
                if self._adapter is not None:
                    call.check_json()
                call.read_deadline()
                if errors.OVERLOADED in self.route.refusals:
                    self._service.check_room()  # before anybody takes the body
                await call.read(self._service.settings.payload_limit, self._service.held)
            request = None if self._adapter is None else checked(self._adapter, call.body)
            answer = await self.route.answer(self._service, call, request)
            if not isinstance(answer, Reply):
                answer = Reply(orjson.dumps(answer, option=NUMBERS))
        except Refusal as error:
            refusal, answer = error, self._refused(error)
        except Exception as error:
            LOG.exception("request %s failed", call.identity.decode())
            refusal = Refusal(errors.FAILED, f"an unexpected error: {type(error).__name__}")
            answer = self._refused(refusal)
        call.give_back(self._service.held)
        seconds = time.monotonic() - call.started
        if refusal is None or refusal.kind is not errors.CLIENT_GONE:
            await _send(send, call, answer, seconds)
        self._measure(call, refusal, seconds)
        if self._log is not None:
            self._log.write(_record(call, answer.status, refusal, seconds))
        if self._tracing is not None:
            self._tracing.tell(call, self.route.path, answer.status, refusal, seconds)

    def _refused(self, refusal: Refusal) -> Reply:
        return refused(self.route.protocol, refusal)

    def _measure(self, call: Call, refusal: Refusal | None, seconds: float) -> None:
        metrics, work = self._service.metrics, call.work
        if refusal is not None:
            name = "" if call.served is None else call.served.name
            metrics.failures[refusal.kind.label, name] += 1
        elif work is not None:
            count = len(work.texts)
            metrics.of(call.served.name).request(
                seconds,
                work.tokenized_seconds / count,
                work.queue_seconds / count,
                work.inference_seconds / count,
            )


def checked(adapter: TypeAdapter[Any], body: bytes) -> Any:
    """What a body says, by its schema; Refusal for what does not fit."""
    try:
        return adapter.validate_json(body)
    except ValidationError as error:
        raise _of_schema(error) from None


def refused(protocol: Protocol, refusal: Refusal) -> Reply:
    """The reply of a request that is refused."""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    if refusal.retry_after is not None:
        headers = ((b"retry-after", b"%d" % refusal.retry_after),)
    if refusal.kind is errors.UNAUTHORIZED:
        headers = ((b"www-authenticate", b"Bearer"),)
    if refusal.kind in (errors.TOO_LARGE, errors.UNAUTHORIZED):
        headers += ((b"connection", b"close"),)  # what is still to come of the body is not read
    body = orjson.dumps(protocol.error(refusal))
    return Reply(body, status=protocol.status(refusal.kind), headers=headers)


async def _send(send: Send, call: Call, answer: Reply, seconds: float) -> None:
    headers = [
        (b"content-type", answer.content_type),
        (b"content-length", b"%d" % len(answer.body)),
        (b"x-request-id", call.identity),
        *answer.headers,
    ]
    work = call.work
    if work is not None and answer.status == 200:
        count, total = len(work.texts), b"%d" % (seconds * 1000)
        headers += (
            (b"x-compute-type", call.served.compute_type),
            (b"x-compute-time", total),
            (b"x-compute-characters", b"%d" % work.characters),
            (b"x-compute-tokens", b"%d" % work.tokens),
            (b"x-total-time", total),
            (b"x-tokenization-time", b"%d" % (work.tokenized_seconds * 1000 / count)),
            (b"x-queue-time", b"%d" % (work.queue_seconds * 1000 / count)),
            (b"x-inference-time", b"%d" % (work.inference_seconds * 1000 / count)),
        )
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})


def _record(call: Call, status: int, refusal: Refusal | None, seconds: float) -> dict[str, Any]:
    """What the log says of a request; times in seconds."""
    record = {
        "time": time.time(),
        "id": call.identity.decode(),
        "method": call.scope["method"],
        "path": call.scope["path"],
        "status": status,
        "seconds": round(seconds, 6),
    }
    work = call.work
    if work is not None:
        count = len(work.texts)
        record |= {
            "model": call.served.name,
            "texts": count,
            "tokens": work.tokens,
            "tokenization": round(work.tokenized_seconds / count, 6),
            "queue": round(work.queue_seconds / count, 6),
            "inference": round(work.inference_seconds / count, 6),
        }
    if refusal is not None:
        record["error"] = refusal.message
    return record


def _of_schema(error: ValidationError) -> Refusal:
    """What is wrong with a body, in a sentence."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    if problems[0]["type"] == "json_invalid":
        return Refusal(errors.MALFORMED, f"the body is no JSON: {problems[0]['msg']}")
    messages = []
    for problem in problems[:MESSAGES]:
        place = ".".join(map(str, problem["loc"]))
        messages.append(f"{place}: {problem['msg']}" if place else problem["msg"])
    if len(problems) > MESSAGES:
        messages.append(f"and {len(problems) - MESSAGES} more")
    first = problems[0]["loc"]
    message = f"the body is not what the route takes: {'; '.join(messages)}"
    return Refusal(errors.INVALID, message, param=str(first[0]) if first else None)
