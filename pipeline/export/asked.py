"""Says of what is asked to be compiled whether it is there, what it needs and how large it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bertile.base import extras
from bertile.base.errors import ModelError, UsageError
from bertile.config import Config
from bertile.export import checkpoints, files
from bertile.onnx import exported, tokenizer_file
from bertile.onnx.exported import TOKENIZER_FILES

# What each kind of MODEL is read with.
_ONNX = ("onnx", "onnxruntime")
_CHECKPOINT = (*_ONNX, "torch", "transformers", "onnxscript", "safetensors")


def check(model: Any, config: Config) -> None:
    """Refuse what cannot be exported, before anything is loaded or fetched.

    Raises ModelError or UsageError for what is not there, is no encoder or cannot have that head,
    MissingExtraError for a package that its export needs.
    """
    plain = files.is_onnx(model) and not files.is_exported(model)
    if config.tokenizer is not None:
        _check_tokenizer(Path(config.tokenizer), plain)
        tokenizer_file.check(Path(config.tokenizer))
    if config.exit_threshold is not None and not _has_early_heads(model):
        raise UsageError(
            f"--exit-threshold is for a model with early heads, which '{model}' has not",
            "train them first: bertile compress MODEL --recipe early-exit",
        )
    if config.labels and (files.is_onnx(model) or files.is_exported(model)):
        raise UsageError(
            "--labels is for a checkpoint of a decoder, not for what is exported already",
            "leave it out, or compile the checkpoint",
        )
    if not isinstance(model, (str, Path)):
        return  # who holds an object has what made it
    if files.is_exported(model):
        described = exported.read(Path(model))
        must_agree(described, model, config.head)
    elif plain:
        try:
            Path(model).open("rb").close()
        except OSError as error:
            raise ModelError(f"'{model}' cannot be read: {error.strerror}") from error
        if config.tokenizer is None:
            tokenizer_file.check(Path(model).parent)
    else:
        directory = checkpoints.check(str(model), config.head, config.labels)
        if directory is not None:
            tokenizer_file.check(files.transformer_directory(directory))
    extras.must_be_there(*packages(model))


def packages(model: Any) -> tuple[str, ...]:
    """What a MODEL is read with; nothing more for an object, whose owner has what made it."""
    if not isinstance(model, (str, Path)):
        return ()
    if files.is_onnx(model):
        return _ONNX
    return (*_CHECKPOINT, *([files.MINILM_MODULE] if str(model) == "minilm" else []))


def must_agree(described: exported.ExportedModel, source: Any, head: str | None) -> None:
    """UsageError where an earlier export has another head than is asked for now."""
    if head not in (None, described.head):
        raise UsageError(
            f"'{source}' was exported with the head '{described.head}', not '{head}'",
            "leave --head out, or export the model again with it",
        )


def _has_early_heads(model: Any) -> bool:
    if not isinstance(model, (str, Path)) or str(model).startswith("synthetic:"):
        return False
    if files.is_exported(model):
        return bool(exported.read(Path(model)).exits)
    if files.is_onnx(model):
        return False
    directory = files.local_directory(str(model))
    return directory is not None and (directory / files.EXITS).is_file()


def weight_bytes(model: Any) -> int:
    """How much the files that hold a model's weights take; 0 where that is not known before."""
    if not isinstance(model, (str, Path)) or str(model).startswith("synthetic:"):
        return 0
    if files.is_exported(model):
        paths = files.exported_files(Path(model))
    elif files.is_onnx(model):
        paths = [Path(model), *Path(model).parent.glob(f"{Path(model).name}?*")]
    else:
        directory = files.local_directory(str(model))
        paths = files.weights_of(directory) if directory else []
        # the same weights in two formats are read once
        paths = [path for path in paths if path.suffix == ".safetensors"] or paths
    return sum(path.stat().st_size for path in paths)


def is_fetched(model: str) -> bool:
    """Whether a MODEL can only be an id of the hub, unchecked until it is fetched."""
    if model.startswith("synthetic:") or files.is_onnx(model):
        return False
    return files.local_directory(model) is None


def _check_tokenizer(directory: Path, onnx: bool) -> None:
    if not onnx:
        raise UsageError(
            "--tokenizer is for an ONNX file", "a checkpoint has its own; leave it out"
        )
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise UsageError(
            f"--tokenizer {directory} has no tokenizer",
            f"give a directory with {TOKENIZER_FILES[0]}",
        )
