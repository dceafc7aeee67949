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
        asked = (str(model), config.head, config.allow_unused, config.rename)
        key = cache.key("export.exporter", exporter.fingerprint(model, config), *asked)
        path, stage.cached = cache.Cache(config.cache_dir).get_or_make(
            key, lambda directory: exporter.export(model, directory, config)
        )
        exported = read(path)
        stage.detail = f"{exported.family}, {exported.head}"
    return exported
