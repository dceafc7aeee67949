"""Shows a page at / on which one compares texts and ranks documents, and sees the throughput."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from starlette.responses import Response
from starlette.routing import Route

FILE = Path(__file__).with_name("start_page.html")


def paths() -> list[Route]:
    """Where the page is."""
    text = FILE.read_bytes()

    async def show(request: Any) -> Response:
        return Response(text, media_type="text/html", headers={"cache-control": "no-cache"})

    return [Route("/", show)]
