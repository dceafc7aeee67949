"""Runs `bertile serve`: bundles over HTTP, for clients that people have."""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bertile.base.errors import BertileError, UsageError
from bertile.base.progress import Progress
from bertile.cli.command import Outcome
from bertile.cli.config_flags import add_some_config, cache_directory
from bertile.cli.option_lists import positive

if TYPE_CHECKING:
    from bertile.server.settings import Settings

HOSTNAME, PORT = "127.0.0.1", 8080
PACKAGES = (
    "uvicorn",
    "uvloop",
    "httptools",
    "starlette",
    "pydantic",
    "orjson",
    "prometheus_client",
)
TRACING_PACKAGES = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
# Of a compile, what may be said here.
COMPILE_FLAGS = ("target", "precision", "tune", "cache-dir")


def add_arguments(parser: ArgumentParser) -> None:
    """Models, limits, keys, and where to listen; names are those of TEI's router."""
    parser.add_argument(
        "models_",
        metavar="[NAME=]DIR",
        nargs="*",
        help="bundles, each under the name of its directory or another; or models, as `bertile"
        " compile` takes them, which are compiled first",
    )
    add = parser.add_argument
    add("--models", metavar="FILE", help="a file with a line [NAME=]DIR each, read again on SIGHUP")
    _add_places(parser.add_argument_group("where, and for whom").add_argument)
    _add_limits(parser.add_argument_group("limits").add_argument)
    _add_texts(parser.add_argument_group("texts").add_argument)
    add_some_config(parser, *COMPILE_FLAGS)


def _add_places(add: Any) -> None:
    add("--hostname", metavar="HOST", default=HOSTNAME, help=f"listen here (default: {HOSTNAME})")
    add(
        "--port",
        metavar="N",
        type=int,
        default=PORT,
        help=f"listen on this port (default: {PORT}; 0: a free one)",
    )
    add("--api-key", metavar="KEY", help="what clients must show (or BERTILE_API_KEY)")
    add(
        "--otlp-endpoint",
        metavar="URL",
        help="tell this collector of OpenTelemetry of each request: http://localhost:4318",
    )
    add(
        "--cors-allow-origin",
        metavar="ORIGIN",
        action="append",
        help="let a browser's pages of this origin ask, or of all: '*'; may be given again",
    )
    add("--admin-key", metavar="KEY", help="for whoever exchanges models (or BERTILE_ADMIN_KEY)")


def _add_limits(add: Any) -> None:
    add("--workers", metavar="N", type=positive, help="calls at once (default: one a core)")
    add("--threads", metavar="N", type=positive, help="cores to use (default: all)")
    add(
        "--max-batch-tokens",
        metavar="N",
        type=positive,
        help="tokens that run together (default: measured at the start)",
    )
    add("--max-client-batch-size", metavar="N", type=positive, help="texts a request (32)")
    add(
        "--max-concurrent-requests",
        metavar="N",
        type=positive,
        help="requests at a time; more get 429 (512)",
    )
    add("--payload-limit", metavar="BYTES", type=positive, help="of a request (2000000)")
    add("--header-timeout", metavar="SECONDS", type=float, help="for a request to arrive (20)")
    add("--keep-alive", metavar="SECONDS", type=float, help="of an idle connection (65)")
    add("--grace", metavar="SECONDS", type=float, help="for requests when it stops (30)")


def _add_texts(add: Any) -> None:
    add(
        "--auto-truncate",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="cut texts that are too long, where a request says nothing (default)",
    )
    add("--default-prompt", metavar="TEXT", help="this before each text")
    add("--default-prompt-name", metavar="NAME", help="the model's prompt of this name")


def run(options: Namespace, progress: Progress) -> Outcome:
    """Serve until a signal ends it."""
    from bertile.base.extras import must_be_there

    must_be_there(*PACKAGES, *(TRACING_PACKAGES if options.otlp_endpoint else ()))
    from bertile.server import model_list, supervisor
    from bertile.server.settings import model_names

    settings = _settings(options)
    if options.models and options.models_:
        raise UsageError("models and --models exclude each other", "leave one of them out")
    if options.models:
        names = model_list.read_list(options.models)
    else:
        names = model_names(options.models_)
    if not names:
        raise UsageError("there is no model to serve", "give the directory of a bundle")
    listener = supervisor.listen(options.hostname, options.port)  # before anything takes time
    with contextlib.ExitStack() as places:
        directories = {
            name: str(_bundle(name, word, options, places, progress))
            for name, word in names.items()
        }
        start = {
            "settings": settings.to_json(),
            "models": directories,
            "models_file": options.models and os.path.abspath(options.models),
        }
        code = supervisor.Supervisor(listener, start, progress.say).run()
    return Outcome({"exit_code": code}, "", code)


def _settings(options: Namespace) -> Settings:
    import dataclasses

    from bertile.server.settings import Settings

    asked: dict[str, Any] = {"quiet": options.quiet > 0}
    for field in dataclasses.fields(Settings):
        value = getattr(options, field.name, None)
        if field.name != "quiet" and value is not None:
            asked[field.name] = value
    for name in ("api_key", "admin_key"):
        if name not in asked and (key := os.environ.get(f"BERTILE_{name.upper()}")):
            asked[name] = key
    return Settings(**asked)


def _bundle(
    name: str, word: str, options: Namespace, places: contextlib.ExitStack, progress: Progress
) -> Path:
    """The directory of a bundle: that which is named, or what a model is compiled into.

    That lies in the cache's directory for as long as it is served. The compile's own stages are
    cached, by all that decides how a bundle comes out.
    """
    if (Path(word) / "manifest.json").is_file():
        return Path(word).absolute()
    from bertile.base import cache, scratch

    flags = []
    for flag in COMPILE_FLAGS:
        value = getattr(options, flag.replace("-", "_"), None)
        if value is not None:
            flags += [f"--{flag}", str(value)]

    home = cache.Cache(cache_directory(getattr(options, "cache_dir", None)))
    home.check()
    home.directory.mkdir(parents=True, exist_ok=True)
    bundle = places.enter_context(scratch.held(home.directory, ".served-")) / name
    progress.say(f"{word} is no bundle: it is compiled first")
    # in a process of its own: this one stays small for as long as it serves; its stages are shown,
    # but not its last words, which are of a directory to keep
    command = [sys.executable, "-m", "bertile", "compile", word, "-o", str(bundle)]
    code = subprocess.run([*command, *flags], stdout=subprocess.DEVNULL).returncode
    if code:
        raise BertileError(f"{word} cannot be served: its compile ended with exit code {code}")
    return bundle
