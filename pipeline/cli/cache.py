"""Runs `bertile cache`: says what the cache of stage results holds, or clears it."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from bertile.base.progress import Progress
from bertile.base.tables import lines, size, table
from bertile.cli.command import Outcome
from bertile.cli.config_flags import add_some_config, cache_directory

ACTIONS = ("show", "clear")


def add_arguments(parser: ArgumentParser) -> None:
    """What to do with the cache, and where it is."""
    parser.add_argument(
        "action",
        metavar="|".join(ACTIONS),
        nargs="?",
        default="show",
        choices=ACTIONS,
        help="show (default): where it is, its size, and what each stage takes of it; clear: remove"
        " what was not used in the last hour",
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="clear: remove what was used in the last hour too, which another process may be using",
    )
    add_some_config(parser, "cache-dir")


def run(options: Namespace, progress: Progress) -> Outcome:
    """What the cache holds, or what clearing has freed and left."""
    from bertile.base.cache import IN_USE_SECONDS, Cache

    cache = Cache(cache_directory(getattr(options, "cache_dir", None)))
    if options.action == "show":
        return _show(cache)
    freed = cache.prune(0, 0 if options.all else IN_USE_SECONDS)
    left = sum(stage["bytes"] for stage in cache.stages().values())
    data = {"cache": str(cache.directory), "freed_bytes": freed, "left_bytes": left}
    text = {"cache": data["cache"], "freed": size(freed), "left": size(left)}
    if left:
        text["why"] = "it is in use" if options.all else "used in the last hour; --all removes it"
    return Outcome(data, lines(text))


def _show(cache: object) -> Outcome:
    stages = cache.stages()
    used = sum(stage["bytes"] for stage in stages.values())
    data = {
        "cache": str(cache.directory),
        "bytes": used,
        "limit_bytes": cache.limit_bytes,
        "stages": stages,
    }
    text = lines({"cache": data["cache"], "size": f"{size(used)} of {size(cache.limit_bytes)}"})
    rows = [
        (stage, of_stage["entries"], size(of_stage["bytes"])) for stage, of_stage in stages.items()
    ]
    if rows:
        text += "\n\n" + table(("stage", "results", "size"), rows)
    return Outcome(data, text)
