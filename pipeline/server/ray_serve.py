"""Makes the server a deployment of Ray Serve: the same application in each of its replicas."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bertile.base.errors import require
from bertile.server.settings import Settings


def deployment(
    directories: Mapping[str, str | Path],
    replicas: int,
    cores: int,
    settings: Settings | None = None,
) -> Any:
    """What `ray.serve.run` takes: so many replicas, each with its own models on `cores` cores.

    `directories` are bundles by name, where each machine of the cluster finds them.
    """
    (serve,) = require("ray-serve", "ray.serve")
    named = {name: str(Path(directory).absolute()) for name, directory in directories.items()}
    own = dataclasses.replace(settings or Settings(), threads=cores)

    def build() -> Any:
        from bertile.server.application import application

        return application(named, own)

    options = {
        "name": "bertile",
        "num_replicas": replicas,
        "ray_actor_options": {"num_cpus": cores},
        # what a replica lets in is its own limit, which answers 429
        "max_ongoing_requests": 2 * own.max_concurrent_requests,
    }
    return serve.deployment(serve.ingress(build)(), **options).bind()
