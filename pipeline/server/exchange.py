"""Exchanges models of a running server, for whoever has the admin key."""

from __future__ import annotations

from typing import Any

from bertile.base.errors import BertileError
from bertile.server import errors, schemas
from bertile.server.call import Call
from bertile.server.endpoint import SERVER, Route
from bertile.server.errors import Refusal
from bertile.server.service import Service


async def put(service: Service, call: Call, request: schemas.ExchangeRequest) -> Any:
    """Serve a bundle under a name; the model that had it answers what it was asked, and goes."""
    if service.settings.admin_key is None:
        raise Refusal(errors.FORBIDDEN, "models are exchanged with an admin key, and there is none")
    try:
        old = await service.models.put(request.name, request.directory)
    except BertileError as error:
        raise Refusal(errors.INVALID, str(error)) from error
    service.changed()
    return {
        "name": request.name,
        "directory": request.directory,
        "replaced": None if old is None else str(old.directory),
        "models": [served.name for served in service.models],
    }


ROUTES = (
    Route(
        "POST",
        "/models",
        put,
        schemas.ExchangeRequest,
        schemas.Exchanged,
        SERVER,
        "Serve a bundle, in the place of that of the same name",
        key="admin",
        refusals=(errors.FORBIDDEN, errors.WRONG_FORM, errors.INVALID),
    ),
)
