"""Joins routes, models and the page of routes to one ASGI application."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import Mount
from starlette.routing import Route as Path_

from bertile.server import (
    cohere,
    description,
    errors,
    exchange,
    kserve_routes,
    openai,
    start_page,
    tei,
)
from bertile.server.endpoint import COHERE, KSERVE, OPENAI, TEI, Endpoint, Protocol, Route, refused
from bertile.server.errors import Refusal
from bertile.server.request_log import RequestLog
from bertile.server.service import Service
from bertile.server.settings import Settings
from bertile.server.tracing import tracing

# In the order in which they are tried.
ROUTES: tuple[Route, ...] = (
    *tei.ROUTES,
    *openai.ROUTES,
    *cohere.ROUTES,
    *kserve_routes.ROUTES,
    *exchange.ROUTES,
)
PREFIXES = {"/v1/rerank": COHERE, "/v2/rerank": COHERE, "/v1": OPENAI, "/v2": KSERVE}


class Application(Starlette):
    """The ASGI application of a server, with its `service`.

    Routes without a parameter are found by their path at once, all others by Starlette; all of
    them by it where there is something in front of the routes.
    """

    service: Service
    endpoints: Mapping[str, Mapping[str, Endpoint]]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request, or start and end with the server."""
        if scope["type"] == "http":
            endpoint = self.endpoints.get(scope["path"], _NONE).get(scope["method"])
            if endpoint is not None:
                await endpoint(scope, receive, send)
                return
        await super().__call__(scope, receive, send)


_NONE: Mapping[str, Endpoint] = {}


def application(
    directories: Mapping[str, str | Path],
    settings: Settings | None = None,
    *,
    routes: Iterable[Route] = ROUTES,
    remember: Callable[[dict[str, str]], None] | None = None,
) -> Application:
    """The server of these bundles, by the names that they are served under.

    They are opened when the application starts, and closed when it ends. `remember` is told the
    directories whenever they have changed.
    """
    settings = settings or Settings()
    service = Service(settings, remember)
    log = None if settings.quiet else RequestLog()
    traces = tracing(settings.otlp_endpoint)
    routes = tuple(routes)
    page = description.page(routes)
    endpoints = [(route, Endpoint(route, service, log, traces)) for route in routes]

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        for name, directory in directories.items():
            await service.models.put(name, directory)
        try:
            yield
        finally:
            await service.models.close()
            if log is not None:
                log.close()

    paths = [_path(route, endpoint) for route, endpoint in endpoints]
    paths += [*description.paths(page), *start_page.paths()]
    below = [_path(route, endpoint) for route, endpoint in endpoints if route.named]
    browsers = _browsers(settings.cors_allow_origin)
    app = Application(
        routes=[*paths, Mount("/{model}", routes=below)],
        middleware=browsers,
        lifespan=lifespan,
        exception_handlers={HTTPException: _no_route},
    )
    app.service, app.endpoints = service, {}
    for route, endpoint in endpoints:
        if "{" not in route.path and not browsers:
            app.endpoints.setdefault(route.path, {})[route.method] = endpoint
    return app


def _browsers(origins: Sequence[str]) -> list[Middleware]:
    """What lets pages of other origins ask, where some may."""
    if not origins:
        return []
    allowed = {"allow_origins": origins, "allow_methods": ["*"], "allow_headers": ["*"]}
    return [Middleware(CORSMiddleware, **allowed, expose_headers=["*"])]


def _path(route: Route, endpoint: Endpoint) -> Path_:
    return Path_(route.path, endpoint, methods=[route.method], name=route.path)


def _no_route(request: Any, error: HTTPException) -> Response:
    """The answer where there is no such path, or not by this method."""
    path, method = request.url.path, request.method
    name = request.path_params.get("model")
    served = name is None or name in request.app.service.models.directories
    allowed = error.status_code != 405 or not served
    kind = errors.UNKNOWN_ROUTE if allowed else errors.WRONG_METHOD
    message = f"{method} is not allowed at {path}" if kind.status == 405 else f"no route {path}"
    reply = refused(_protocol(path), Refusal(kind, message))
    headers = error.headers if kind is errors.WRONG_METHOD else None
    content_type = reply.content_type.decode()
    return Response(reply.body, reply.status, headers=headers, media_type=content_type)


def _protocol(path: str) -> Protocol:
    matching = (protocol for prefix, protocol in PREFIXES.items() if path.startswith(prefix))
    return next(matching, TEI)
