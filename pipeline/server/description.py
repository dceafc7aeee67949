"""Describes the routes: an OpenAPI document of their schemas, and a page that shows it."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import orjson
from pydantic import TypeAdapter
from starlette.responses import Response
from starlette.routing import Route as Path_

from bertile.server import errors
from bertile.server.endpoint import Route
from bertile.server.errors import Kind, Refusal

TEMPLATE = "#/components/schemas/{model}"


def page(routes: Sequence[Route]) -> dict[str, Any]:
    """The OpenAPI document, 3.1, of the routes that are not hidden."""
    shown = [route for route in routes if not route.hidden]
    adapters = {id(kind): TypeAdapter(kind) for route in shown for kind in _kinds(route)}
    keyed = [(key, "validation", adapter) for key, adapter in adapters.items()]
    schemas, definitions = TypeAdapter.json_schemas(keyed, ref_template=TEMPLATE)
    schema_of = {key: schema for (key, _), schema in schemas.items()}
    paths: dict[str, Any] = {}
    for route in shown:
        path = route.path.replace(":path}", "}")
        paths.setdefault(path, {})[route.method.lower()] = _operation(route, schema_of)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Bertile",
            "version": version("bertile"),
            "description": "Bundles that answer texts, for clients of Text Embeddings Inference,"
            " OpenAI, Cohere and KServe. Below each model's name, as in /NAME/embed, are TEI's"
            " routes of that model.",
            "license": {"name": "Apache 2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": definitions.get("$defs", {}),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _kinds(route: Route) -> list[Any]:
    return [kind for kind in (route.body, route.gives, route.protocol.schema) if kind is not None]


def _operation(route: Route, schema_of: dict[int, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "tags": [route.protocol.tag],
        "summary": route.summary,
        "operationId": f"{route.method.lower()}{route.path}".translate(_NO_SIGNS),
        "responses": _responses(route, schema_of),
    }
    if route.path_params:
        operation["parameters"] = [
            {
                "name": name,
                "in": "path",
                "required": True,
                "description": text,
                "schema": {"type": "string", "minLength": 1},
            }
            for name, text in route.path_params.items()
        ]
    if route.key:
        operation["security"] = [{"key": []}]
    if route.body is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema_of[id(route.body)]}},
        }
    return operation


_NO_SIGNS = str.maketrans("/{}:", "____")


def _responses(route: Route, schema_of: dict[int, Any]) -> dict[str, Any]:
    responses: dict[str, Any] = {"200": {"description": "The answer"}}
    if route.gives is not None:
        schema = {"type": "string"} if route.gives is str else schema_of[id(route.gives)]
        responses["200"]["content"] = {route.content_type: {"schema": schema}}
    kinds = list(route.refusals)
    if route.key:
        kinds.append(errors.UNAUTHORIZED)
    if route.method == "POST":
        kinds += [errors.MALFORMED, errors.TOO_SLOW, errors.TOO_LARGE, errors.FAILED]
    by_status: dict[int, list[Kind]] = {}
    for kind in kinds:
        by_status.setdefault(route.protocol.status(kind), []).append(kind)
    for status, same in sorted(by_status.items()):
        example = route.protocol.error(Refusal(same[0], _MEANING[same[0]]))
        responses[str(status)] = {
            "description": "; ".join(dict.fromkeys(_MEANING[kind] for kind in same)),
            "content": {
                "application/json": {
                    "schema": schema_of[id(route.protocol.schema)],
                    "example": example,
                }
            },
        }
    return responses


_MEANING = {
    errors.EMPTY: "Batch is empty",
    errors.MALFORMED: "The body is no JSON",
    errors.UNAUTHORIZED: "The API key is missing or wrong",
    errors.FORBIDDEN: "There is no admin key",
    errors.UNKNOWN_MODEL: "The model does not exist",
    errors.TOO_SLOW: "The request did not arrive in time",
    errors.TOO_LARGE: "The body is too large",
    errors.TOO_MANY: "Batch size error",
    errors.WRONG_FORM: "The body is said to be no JSON",
    errors.INVALID: "Input validation error",
    errors.TOKENIZER: "Tokenization error",
    errors.WRONG_MODEL: "The model does not answer on this route",
    errors.BACKEND: "Inference failed",
    errors.OVERLOADED: "Model is overloaded",
    errors.FAILED: "An unexpected error",
    errors.UNHEALTHY: "Unhealthy",
    errors.EXPIRED: "The deadline is over",
}


def paths(document: dict[str, Any]) -> list[Path_]:
    """Where the document and its page are."""
    body, text = orjson.dumps(document), as_html(document).encode()

    async def openapi(request: Any) -> Response:
        return Response(body, media_type="application/json")

    async def docs(request: Any) -> Response:
        return Response(text, media_type="text/html")

    return [
        Path_("/openapi.json", openapi),
        Path_("/api-doc/openapi.json", openapi),
        Path_("/docs", docs),
    ]


def as_html(document: dict[str, Any]) -> str:
    """The document as a page that loads nothing from elsewhere."""
    parts = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parts.append(_section(document, path, method, operation))
    info = document["info"]
    return _PAGE.format(
        title=html.escape(info["title"]),
        version=html.escape(info["version"]),
        text=html.escape(info["description"]),
        sections="\n".join(parts),
    )


def _section(document: dict[str, Any], path: str, method: str, operation: dict[str, Any]) -> str:
    body = operation.get("requestBody", {}).get("content", {}).get("application/json")
    rows = "".join(
        f"<tr><td>{status}</td><td>{html.escape(answer['description'])}</td></tr>"
        for status, answer in operation["responses"].items()
    )
    example = ""
    if body:
        schema = _resolved(document, body["schema"])
        request = json.dumps(_example(document, schema), ensure_ascii=False)
        fields = "".join(
            f"<tr><td><code>{html.escape(name)}</code></td>"
            f"<td>{html.escape(field.get('description', ''))}</td></tr>"
            for name, field in schema.get("properties", {}).items()
        )
        command = f"curl localhost:8080{path} -H 'Content-Type: application/json' -d '{request}'"
        example = f"<pre>{html.escape(command)}</pre><table>{fields}</table>"
    return _SECTION.format(
        method=method.upper(),
        path=html.escape(path),
        summary=html.escape(operation["summary"]),
        tag=html.escape(operation["tags"][0]),
        example=example,
        rows=rows,
    )


def _resolved(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    reference = schema.get("$ref")
    if reference is None:
        return schema
    return document["components"]["schemas"][reference.rpartition("/")[2]]


def _example(document: dict[str, Any], schema: dict[str, Any]) -> Any:
    """A body with what must be there."""
    example = {}
    for name in schema.get("required", ()):
        field = _resolved(document, schema["properties"][name])
        if "examples" in schema["properties"][name]:
            example[name] = schema["properties"][name]["examples"][0]
        elif "properties" in field:
            example[name] = _example(document, field)
    return example


_SECTION = """<section><h2><b>{method}</b> <code>{path}</code> <small>{tag}</small></h2>
<p>{summary}.</p>{example}<table>{rows}</table></section>"""
_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}: routes</title>
<meta name="viewport" content="width=device-width">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem;
color: #222; background: #fff }}
section {{ border-top: 1px solid #ddd; padding: .5rem 0 1rem }}
h2 {{ font-size: 1.05rem }} h2 b {{ color: #06c }} small {{ color: #777; font-weight: normal }}
pre {{ background: #f4f4f4; padding: .6rem; overflow-x: auto }}
td {{ padding: .1rem .8rem .1rem 0; vertical-align: top }}
</style>
<h1>{title} {version}</h1><p>{text}</p><p><a href="/openapi.json">openapi.json</a></p>
{sections}
</html>
"""
