"""Prunes a model into a Hugging Face directory, which `compile` takes."""

from __future__ import annotations

import dataclasses
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bertile.base import directories, quiet
from bertile.base.errors import UsageError
from bertile.base.progress import Progress
from bertile.export import checkpoints, files, learned_ranges, pruning

REPORT = "pruned.json"
ACCURACY = (
    "The smallest weights were removed at once and nothing was trained: answers are worse, and"
    " useless at high sparsity, until the model is retrained with these zeros held."
)


def prune(
    model: str,
    output: str | Path,
    sparsity: float | None = None,
    pattern: str = "4x1",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write MODEL, pruned, to `output` and return what REPORT says in there.

    `sparsity` and `pattern` are as in ``pruning.prune``; None takes the pattern's default. Raises
    UsageError for what cannot be pruned so, ModelError for a model that cannot be read; nothing
    half-written stays behind.
    """
    progress = progress or Progress(verbosity=-1)
    sparsity = pruning.check(sparsity, pattern)
    if files.is_onnx(model):
        raise UsageError(
            f"'{model}' is in ONNX, and prune needs a Hugging Face directory",
            "give the directory that it was exported from",
        )
    with progress.stage("load"):
        checkpoint = checkpoints.load(model)
    with progress.stage("prune") as stage, quiet.quiet():
        rows = pruning.prune(checkpoint.model, checkpoint.family, sparsity, pattern)
        stage.detail = f"{len(rows)} layers"
    report = {
        "bertile": version("bertile"),
        "model": str(model),
        "sparsity": sparsity,
        "pattern": pattern,
        "layers": [dataclasses.asdict(row) for row in rows],
        "accuracy": ACCURACY,
    }
    with progress.stage("write") as stage, directories.making(output, REPORT) as directory:
        _write(str(model), checkpoint.model, directory)
        report = directories.mark(directory, REPORT, report)
        stage.detail = str(output)
    return {**report, "output": str(output)}


def _write(source: str, model: Any, directory: Path) -> None:
    """The weights with their config, and whatever else lies beside them that is read."""
    place = directory
    if not source.startswith("synthetic:"):
        origin = files.find_directory(source)
        # what a training says of the weights is true of those before
        for path in files.companions(origin):
            if path.name == learned_ranges.REPORT:
                continue
            target = directory / path.relative_to(origin)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
        place = directory / files.transformer_directory(origin).relative_to(origin)
    with quiet.quiet():
        model.save_pretrained(place)
    for path in place.glob("*.safetensors"):  # which save_pretrained lets nobody else read
        path.chmod((place / "config.json").stat().st_mode)
