"""Answers on the routes of KServe's protocol 2, for clients of Triton and of its relatives."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from bertile.base.errors import InputError
from bertile.server import errors, kserve, schemas
from bertile.server.call import Call
from bertile.server.catalogue import CLASSIFIERS, DENSE, OTHER, SPARSE, Served
from bertile.server.endpoint import ASKING, KSERVE, Reply, Route
from bertile.server.errors import Refusal
from bertile.server.service import Service
from bertile.server.tei import choose, cutting, dense_steps, limited
from bertile.text.tokens import Ids

TEXT, PAIR = "text", "text_pair"
IDS = ("input_ids", "attention_mask", "token_type_ids")
VERSION = "1"  # the only one of a model
PARAMETERS = TypeAdapter(schemas.KServeParameters)


async def live(service: Service, call: Call, request: None) -> Any:
    """Whether the server is there."""
    return {"live": True}


async def ready(service: Service, call: Call, request: None) -> Any:
    """Whether requests are answered."""
    if service.stopping or not len(service.models):
        raise Refusal(errors.UNHEALTHY, "unhealthy")
    return {"ready": True}


async def server(service: Service, call: Call, request: None) -> Any:
    """What serves, and what it can beside the protocol."""
    return {
        "name": "bertile",
        "version": version("bertile"),
        "extensions": ["binary_tensor_data"],
    }


async def model(service: Service, call: Call, request: None) -> Any:
    """The tensors of a model."""
    served = _served(service, call)
    inputs = [{"name": TEXT, "datatype": kserve.TEXTS, "shape": [-1]}]
    if served.kind in CLASSIFIERS:
        inputs.append({"name": PAIR, "datatype": kserve.TEXTS, "shape": [-1]})
    names = [name for name in IDS[:2] if name in served.model.model.inputs]
    inputs += [{"name": name, "datatype": "INT64", "shape": [-1, -1]} for name in names]
    outputs = []
    for spec in served.manifest["outputs"]:
        axes = [size if isinstance(size, int) else -1 for size in spec["axes"]]
        if served.kind == DENSE:
            axes[-1] = served.dimensions
        outputs.append({"name": spec["name"], "datatype": "FP32", "shape": axes})
    return {
        "name": served.name,
        "versions": [VERSION],
        "platform": "bertile_bundle",
        "inputs": inputs,
        "outputs": outputs,
    }


async def model_ready(service: Service, call: Call, request: None) -> Any:
    """Whether a model answers."""
    return {"name": _served(service, call).name, "ready": True}


async def infer(service: Service, call: Call, request: None) -> Any:
    """The outputs of a model for texts, pairs of texts, or ids."""
    served = choose(service, call, _served(service, call).name)
    body, length = call.body, call.headers.get(kserve.HEADER.encode())
    encoding = call.headers.get(b"content-encoding", b"identity").decode("latin-1").lower()
    try:
        if encoding != "identity":
            body = kserve.plain(body, encoding, service.settings.payload_limit)
        message = kserve.read(body, None if length is None else length.decode("latin-1"))
        asked = kserve.wanted(message, [spec["name"] for spec in served.manifest["outputs"]])
        texts = _texts(message, served)
        call.method = "batch" if len(texts) != 1 else "single"
        parameters = PARAMETERS.validate_python(message.parameters)
    except InputError as error:
        raise Refusal(errors.MALFORMED, str(error)) from error
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        name = ".".join(map(str, problem["loc"]))
        raise Refusal(errors.MALFORMED, f"parameter {name}: {problem['msg']}") from None
    texts = limited(service, call, texts)
    results = await service.ask(call, texts, _steps(service, served, parameters), _counted(served))
    outputs = _tensors(served, results)
    body, header_length = kserve.answer(served.name, message, asked, outputs)
    if header_length is None:
        return Reply(body)
    headers = ((kserve.HEADER.encode(), b"%d" % header_length),)
    return Reply(body, b"application/octet-stream", headers=headers)


def _served(service: Service, call: Call) -> Served:
    served = service.models.find(call.path_params["name"])
    if (asked := call.path_params.get("version", VERSION)) != VERSION:
        raise Refusal(errors.UNKNOWN_MODEL, f"model '{served.name}' has no version '{asked}'")
    return served


def _texts(message: kserve.Request, served: Served) -> list[Any]:
    """The texts, pairs or ids of a request."""
    names = set(message.inputs)
    if TEXT in names and names <= {TEXT, PAIR}:
        texts = kserve.texts(message.inputs[TEXT], TEXT)
        if PAIR not in names:
            return texts
        if served.kind not in CLASSIFIERS:
            raise InputError(f"model '{served.name}' takes no pairs", f"leave {PAIR} out")
        pairs = kserve.texts(message.inputs[PAIR], PAIR)
        if len(pairs) != len(texts):
            raise InputError(f"{TEXT} has {len(texts)} elements, {PAIR} has {len(pairs)}")
        return list(zip(texts, pairs))
    if "input_ids" in names and names <= set(IDS):
        return [Ids(ids) for ids in kserve.token_ids(message.inputs)]
    raise InputError(
        f"model '{served.name}' does not take the inputs {', '.join(sorted(names))} together",
        f"send {TEXT}, or input_ids with attention_mask",
    )


def _steps(service: Service, served: Served, parameters: schemas.KServeParameters) -> Any:
    if served.kind == DENSE:
        normalize, dimensions = parameters.normalize, parameters.dimensions
        return dense_steps(service, served, parameters, dimensions, normalize)
    return served.steps(parameters.prompt_name, **cutting(service, parameters))


def _counted(served: Served) -> str:
    return "predict" if served.kind in (*CLASSIFIERS, OTHER) else "embed"


def _tensors(served: Served, results: Sequence[Any]) -> dict[str, np.ndarray]:
    """Of each output the rows of all texts, those by token with zeros behind the shorter texts."""
    names = [spec["name"] for spec in served.manifest["outputs"]]
    if served.kind == OTHER:
        return {name: _stacked([result[name] for result in results]) for name in names}
    if served.kind == SPARSE:
        results = [vector.dense() for vector in results]
    return {names[0]: _stacked(results)}


def _stacked(rows: Sequence[np.ndarray]) -> np.ndarray:
    """(n, …) float32 of arrays that differ in their first axis at most."""
    shapes = {row.shape for row in rows}
    if len(shapes) == 1:
        return np.stack(rows).astype(np.float32, copy=False)
    longest = max(len(row) for row in rows)
    tensor = np.zeros((len(rows), longest, *rows[0].shape[1:]), np.float32)
    for place, row in zip(tensor, rows):
        place[: len(row)] = row
    return tensor


_NAMES = {"name": "a name of /v1/models"}
_NAMED = (errors.UNKNOWN_MODEL,)
_INFER = (*ASKING, errors.UNKNOWN_MODEL)
_OF_A_MODEL = (
    ("GET", "", model, None, schemas.KServeModel, "The tensors of a model", _NAMED),
    ("GET", "/ready", model_ready, None, schemas.KServeReady, "Whether a model answers", _NAMED),
    ("POST", "/infer", infer, None, schemas.KServeAnswer, "The outputs of a model", _INFER),
)
ROUTES = (
    Route("GET", "/v2", server, None, schemas.KServeServer, KSERVE, "What serves"),
    Route(
        "GET",
        "/v2/health/live",
        live,
        None,
        schemas.KServeLive,
        KSERVE,
        "Whether the server is there",
        key="",
    ),
    Route(
        "GET",
        "/v2/health/ready",
        ready,
        None,
        schemas.KServeReady,
        KSERVE,
        "Whether requests are answered",
        key="",
        refusals=(errors.UNHEALTHY,),
    ),
    *(
        Route(
            method,
            f"/v2/models/{{name}}{versions}{path}",
            answer,
            takes,
            gives,
            KSERVE,
            summary,
            refusals=refusals,
            hidden=bool(versions),
            path_params=_NAMES,
            shows=schemas.KServeRequest if method == "POST" else None,
        )
        for versions in ("", "/versions/{version}")
        for method, path, answer, takes, gives, summary, refusals in _OF_A_MODEL
    ),
)
