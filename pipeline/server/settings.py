"""Holds what a server may take, keep and wait for; names are those of Text Embeddings Inference."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from bertile.base.errors import UsageError

# The first word of a path that a route has: no model can be called so.
RESERVED = frozenset(
    "docs embed embed_all embed_sparse embeddings health info metrics models openapi.json ping"
    " predict rerank similarity tokenize decode v1 v2".split()
)


@dataclass(frozen=True)
class Settings:
    """The limits and keys of one server.

    max_concurrent_requests  requests that are in the house at a time; what is more is refused (429)
    max_client_batch_size    texts of one request
    max_batch_tokens         tokens that run together; None: measured at the start
    payload_limit            bytes of a request's body
    auto_truncate            whether a text that is too long is cut where the request says nothing
    default_prompt           put in front of every text where a request names no prompt
    default_prompt_name      the same, by a name that the model has
    api_key, admin_key       what a client, or one that exchanges models, must show; None: nothing
    workers                  calls that a model answers at once; None: one a core
    threads                  cores that the server may use; None: all
    grace                    seconds that a stop waits for requests
    header_timeout           seconds in which a request must have arrived whole
    keep_alive               seconds after which an idle connection is closed
    quiet                    no line a request
    otlp_endpoint            the collector that OpenTelemetry's spans go to; None: none is named
    cors_allow_origin        origins whose pages a browser lets ask; "*": all
    """

    max_concurrent_requests: int = 512
    max_client_batch_size: int = 32
    max_batch_tokens: int | None = None
    payload_limit: int = 2_000_000
    auto_truncate: bool = True
    default_prompt: str | None = None
    default_prompt_name: str | None = None
    api_key: str | None = field(default=None, repr=False)
    admin_key: str | None = field(default=None, repr=False)
    workers: int | None = None
    threads: int | None = None
    grace: float = 30.0
    header_timeout: float = 20.0
    keep_alive: float = 65.0
    quiet: bool = False
    otlp_endpoint: str | None = None
    cors_allow_origin: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "max_concurrent_requests",
            "max_client_batch_size",
            "max_batch_tokens",
            "payload_limit",
            "workers",
            "threads",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}", "give a whole number from 1")
        if min(self.grace, self.header_timeout, self.keep_alive) < 0:
            raise UsageError("a time is negative", "give seconds from 0")
        if self.default_prompt is not None and self.default_prompt_name is not None:
            raise UsageError(
                "default_prompt and default_prompt_name exclude each other", "leave one of them out"
            )

    def to_json(self) -> dict[str, Any]:
        """All fields, keys among them."""
        return dataclasses.asdict(self)


def model_names(words: list[str]) -> dict[str, str]:
    """Directories by the names that they are served under, of words DIR or NAME=DIR.

    A directory without a name is called as its last part. UsageError for two of one name, for a
    name with a slash, and for one that a route has.
    """
    named: dict[str, str] = {}
    for word in words:
        name, separator, directory = word.partition("=")
        if not separator:
            directory = word
            name = word.rstrip("/").rpartition("/")[2]
        check_name(name)
        if not directory:
            raise UsageError(f"'{word}' names no directory", "give NAME=DIR")
        if name in named:
            raise UsageError(f"two models are called '{name}'", "give one another name: NAME=DIR")
        named[name] = directory
    return named


def check_name(name: str) -> None:
    """Raise UsageError for what no model can be called."""
    if not name or "/" in name or name in RESERVED or name in (".", ".."):
        raise UsageError(f"no model can be called '{name}'", "give it another name: NAME=DIR")
