"""Exports a model, or finds in the cache what was exported before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bertile.base import cache
from bertile.base.progress import Progress
from bertile.config import Config
from bertile.export import exporter, objects
from bertile.onnx.exported import ExportedModel, read


def export_cached(model: Any, config: Config, progress: Progress | None = None) -> ExportedModel:
    """The exported model, from the cache where the same model was exported before."""
    progress = progress or Progress(verbosity=-1)
    with progress.stage("export") as stage:
        if not isinstance(model, (str, Path)):
            model = objects.opened(model)  # once: what it saves goes into the key and the export
        path, stage.cached = cache.Cache(config.cache_dir).get_or_make(
            _key(model, config), lambda directory: exporter.export(model, directory, config)
        )
        exported = read(path)
        stage.detail = f"{exported.family}, {exported.head}"
    return exported


def has(model: Any, config: Config) -> bool:
    """Whether the cache has the exported model; a hub id that is not on this machine is fetched."""
    return cache.Cache(config.cache_dir).has(_key(model, config))


def _key(model: Any, config: Config) -> str:
    outputs = (config.output_hidden_states, config.output_attentions)
    exits = config.exit_threshold is not None
    allowed = (config.allow_unused, config.trust_remote_code)
    asked = (str(model), config.head, config.labels, *allowed, *outputs, exits, config.rename)
    return cache.key("export.exporter", exporter.fingerprint(model, config), *asked)
