"""Ten thousand requests made of the page of routes: the server answers all, and never by a 5xx."""

from __future__ import annotations

import collections
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from helpers.server_at_port import at_port

REQUESTS = 10_000
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance"
CHECKS += ",response_schema_conformance"


class Counting:
    """An application whose answers are counted by their status."""

    def __init__(self, app: Any) -> None:
        self._app, self.statuses = app, collections.Counter()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def noted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.statuses[message["status"]] += 1
            await send(message)

        await self._app(scope, receive, noted if scope["type"] == "http" else send)


@pytest.mark.slow
def test_no_request_that_fits_or_breaks_the_description_fails(
    directories: dict[str, Path], open_stand_in: Any, tmp_path: Path
) -> None:
    pytest.importorskip("schemathesis", reason="which makes the requests")
    from bertile.server.application import application
    from bertile.server.settings import Settings

    command = shutil.which("schemathesis", path=str(Path(sys.executable).parent))
    names = ("dense", "score", "labels", "encoder", "splade")
    settings = Settings(max_batch_tokens=512, quiet=True)
    app = Counting(application({name: directories[name] for name in names}, settings))
    with at_port(app) as port:
        run = [command, "run", f"http://127.0.0.1:{port}/openapi.json", "--checks", CHECKS]
        run += ["--phases", "examples,coverage,fuzzing", "--no-shrink"]
        turn = 0
        while app.statuses.total() < REQUESTS:
            turn += 1
            examples = ["--max-examples", "500", "--seed", str(turn), "--request-timeout", "20"]
            done = subprocess.run(
                [*run, *examples], capture_output=True, text=True, cwd=tmp_path, check=False
            )
            assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=20) as answer:
            assert answer.status == 200
    assert not [status for status in app.statuses if status >= 500], app.statuses
