"""Loads a directory's weights into transformers' model, and refuses one that is another model.

A directory may say `model_type` bert and mean something else: by code of its own, by a kind of
positions, or by tensors that BERT does not have. transformers warns and computes plain BERT.
"""

from __future__ import annotations

import copy
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bertile.base.errors import ModelError, require
from bertile.export import objects
from bertile.export.removed_heads import class_without
from bertile.families import table
from bertile.families.model_config import read_object
from bertile.onnx.source_files import inside

ADAPTER = "adapter_config.json"
# What says how transformers computes or answers, and nothing of what the model is.
FORM = {
    *("attn_implementation", "experts_implementation", "chunk_size_feed_forward"),
    *("return_dict", "torchscript", "output_attentions", "output_hidden_states"),
    *("dtype", "torch_dtype", "auto_map", "architectures"),
}
# Tensors of heads that transformers has for these families, and what training leaves behind. They
# change nothing of a model that has no such part.
OTHER_HEADS = (
    *("pooler", "classifier", "pre_classifier", "qa_outputs", "sequence_summary", "sop_classifier"),
    *("cls", "cls.seq_relationship", "cls.predictions", "lm_head", "predictions"),
    *("head", "decoder"),
    *("vocab_transform", "vocab_layer_norm", "vocab_projector"),
    *("score", "classification_head", "qa_output", "embed_out", "lm_loss", "summary"),
    *("discriminator_predictions", "generator_predictions", "generator_lm_head"),
    *("loss", "loss_fct", "criterion"),
)
# Numbers of places, which older versions of transformers saved with the weights.
BUFFERS = ("position_ids", "token_type_ids")
# What tensors of layers are called, of old too; and the dtypes of floats in files and in torch.
WEIGHTS = ("weight", "bias", "gamma", "beta")
FLOATS = {*("F16", "BF16", "F32", "F64"), *("float16", "bfloat16", "float32", "float64")}
# Parameters that a file need not have (a pooler's), or of which it has less than a byte each.
SLACK = 1 << 27

_ALLOW = "--allow-unused compiles it without them, if that is right for this model"


class Allowed(NamedTuple):
    """What a user has allowed: to leave out what the model does not read; to run its own code."""

    unused: bool = False
    code: bool = False


def load(
    source: str,
    directory: Path,
    config: Mapping[str, Any],
    auto_class: Any,
    head: str,
    allowed: Allowed,
) -> tuple[Any, tuple[str, ...]]:
    """The model in `directory` in float32 with eager attention, and notes for people.

    `config` is its checked config.json, `auto_class` the transformers class that loads it. Raises
    ModelError, with names, for a checkpoint that cannot be read, for one that lacks weights of the
    model, and, unless that is `allowed`, for one that holds more than the model reads.
    """
    torch, transformers = require("export", "torch", "transformers")
    notes: tuple[str, ...] = ()
    if allowed.code:
        settings = _settings_of_code(transformers, directory)
        loader: Any = _OwnCode(auto_class)
    else:
        settings = _settings(transformers, directory, config)
        loader = _loader(auto_class, settings)
    held = _check_files(torch, loader, directory, settings)
    try:
        with torch.device("cpu"):  # whatever device the program around has chosen
            model, report = loader.from_pretrained(
                directory,
                config=settings,
                dtype=torch.float32,
                attn_implementation="eager",
                ignore_mismatched_sizes=True,  # refused below, with their names
                output_loading_info=True,
                local_files_only=True,
            )
    except Exception as error:  # whatever a damaged file makes the libraries raise
        raise _unloadable(directory, error) from error
    _refuse_mismatched(directory, report["mismatched_keys"])
    missing = sorted(report["missing_keys"])
    pooler = [key for key in missing if ".pooler." in f".{key}"]
    if missing and (len(pooler) < len(missing) or head not in ("encoder", "embedding")):
        absent = next((key for key in missing if key not in pooler), missing[0])
        raise ModelError(
            f"'{source}' has no weights for the head '{head}' (no {absent})",
            "choose the head that it was trained with",
        )
    unread = _unread(model, head, report["unexpected_keys"], held)
    if unread and not allowed.unused:
        raise ModelError(
            f"'{source}' is not the model that its model_type '{config['model_type']}' names: its"
            f" tensors {_listed(unread)} are never read",
            _ALLOW,
        )
    if unread:
        notes = (*notes, f"tensors that are not read: {_listed(unread)}")
    if pooler:
        model.base_model.pooler = None
        notes = (*notes, "the checkpoint has no pooler weights: no pooler_output")
    return model.eval(), notes


def tensors(place: Path) -> dict[str, Any]:
    """The tensors of a module that has a directory, or a file, of its own, in float32.

    Raises ModelError where there are none, and for what `load` refuses in files too.
    """
    (torch,) = require("export", "torch")
    held: dict[str, Any] = {}
    files = _weight_files(place) if place.is_dir() else [place]
    for path in files:
        _names(torch, path)
        try:
            if path.suffix == ".safetensors":
                (safetensors,) = require("export", "safetensors.torch")
                held |= safetensors.load_file(path)
            else:
                held |= torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged file makes the libraries raise
            raise _unloadable(path, error) from error
    if not files:
        raise ModelError(
            f"'{place}' has no weights", "copy its model.safetensors to there, or save it again"
        )
    return {name: tensor.float() for name, tensor in held.items()}


def tensor(held: Mapping[str, Any], name: str, rank: int, directory: Path) -> Any:
    """The tensor of that name and rank among those of a directory; ModelError without it."""
    if name not in held or held[name].ndim != rank:
        raise ModelError(f"the weights in '{directory}' have no '{name}' of {rank} axes")
    return held[name]


def own_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """The classes of a model that lie in its directory, by what they stand for."""
    return {
        key: value
        for key, value in (config.get("auto_map") or {}).items()
        if key.startswith(("AutoConfig", "AutoModel")) and value
    }


def refuse_other_models(
    source: str, directory: Path, config: Mapping[str, Any], allowed: Allowed
) -> tuple[str, ...]:
    """ModelError for a config that says that it means another model than its type names; notes for
    people where that is allowed.
    """
    if method := (config.get("quantization_config") or {}).get("quant_method"):
        raise ModelError(
            f"'{source}' is quantized ({method!r}), which is unsupported",
            "give the model in floats, and quantize it with --precision int8",
        )
    reasons, hint, notes = [], _ALLOW, ()
    if code := own_code(config):
        names = _listed([f"{key}: {value}" for key, value in code.items()])
        if allowed.code:
            notes = (f"computed by code of its own (auto_map, {names})",)
        else:
            reasons.append(f"code of its own (auto_map, {names})")
            hint = f"--trust-remote-code runs that code; {_ALLOW}"
    positions = config.get("position_embedding_type")
    if positions not in (None, *_positions(config)) and not allowed.code:
        reasons.append(f"position_embedding_type '{positions}'")
    if (directory / ADAPTER).exists():
        reasons.append(f"an adapter ({ADAPTER})")
    if reasons and not allowed.unused:
        raise ModelError(
            f"'{source}' is not the model that its model_type '{config['model_type']}' names: it"
            f" has {' and '.join(reasons)}",
            hint,
        )
    return (*notes, *(f"left out: {reason}" for reason in reasons))


def _positions(config: Mapping[str, Any]) -> tuple[Any, ...]:
    """The values of `position_embedding_type` that a type's models may have: those of its row, else
    any of which transformers reads.
    """
    (transformers,) = require("export", "transformers")
    model_type = config["model_type"]
    family = table.of_type(model_type)
    if family is not None or model_type not in transformers.CONFIG_MAPPING:
        return (family or table.answering(model_type)).position_types
    read = hasattr(transformers.CONFIG_MAPPING[model_type](), "position_embedding_type")
    return (config["position_embedding_type"],) if read else ("absolute",)


class _OwnCode:
    """An auto class that runs the code in a directory."""

    def __init__(self, auto_class: Any) -> None:
        self._auto_class = auto_class

    def from_pretrained(self, *positional: Any, **keywords: Any) -> Any:
        return self._auto_class.from_pretrained(*positional, **keywords, trust_remote_code=True)

    def from_config(self, settings: Any) -> Any:
        return self._auto_class.from_config(settings, trust_remote_code=True)


def _settings_of_code(transformers: Any, directory: Path) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(
            directory, trust_remote_code=True, local_files_only=True
        )
    except Exception as error:  # anyone's code
        raise ModelError(
            f"'{directory}' has a config.json that its own code does not take: {_reason(error)}"
        ) from error


def _settings(transformers: Any, directory: Path, config: Mapping[str, Any]) -> Any:
    """transformers' configuration of it, which may be of an older transformers' time."""
    kind = transformers.CONFIG_MAPPING[config["model_type"]]
    values = {
        key: value
        for key, value in config.items()
        if key not in FORM and not key.startswith("_") and _can_be_set(kind, key)
    }
    # by which transformers chooses among several classes of a type
    values["architectures"] = config.get("architectures") or []
    try:
        return transformers.AutoConfig.for_model(**values)
    except Exception as error:  # each version checks in its own way
        raise ModelError(
            f"'{directory}' has a config.json that transformers does not take: {_reason(error)}"
        ) from error


def _loader(auto_class: Any, settings: Any) -> Any:
    """What has the method `from_pretrained`; a model's own class where it lacks heads."""
    removed = getattr(settings, "pruned_heads", None)
    family = table.of_type(settings.model_type)
    if not removed or family is None:  # a type without a row has its own way with them
        return auto_class
    return class_without(auto_class._model_mapping[type(settings)], family, removed)


def _built(loader: Any, settings: Any) -> Any:
    """A model without weights, by an auto class or a model's own."""
    build = getattr(loader, "from_config", loader)
    return build(copy.deepcopy(settings))


def _can_be_set(kind: type, key: str) -> bool:
    """Whether a configuration takes a value of that name: not what it has a method for, nor what
    became a property since.
    """
    known = getattr(kind, key, None)
    return not callable(known) and not (isinstance(known, property) and known.fset is None)


def _check_files(torch: Any, loader: Any, directory: Path, settings: Any) -> set[str]:
    """The names of all tensors in the files; refused are files outside, pickled objects, and a
    config that asks for more weights than there are.
    """
    files = _weight_files(directory)
    if not files:
        return set()  # which from_pretrained says better
    names = {name for path in files for name in _names(torch, path)}
    try:
        with torch.device("meta"):
            model = _built(loader, settings)
    except Exception as error:  # a configuration that does not fit together
        raise _unloadable(directory, error) from error
    asked = sum(parameter.numel() for parameter in model.parameters())
    held = sum(path.stat().st_size for path in files)
    if asked > held + SLACK:
        raise ModelError(
            f"the weights in '{directory}' cannot be loaded: config.json asks for"
            f" {asked / 1e6:,.0f} million, and the files have {held / 1e6:,.0f} MB"
        )
    return names


def _weight_files(directory: Path) -> list[Path]:
    """The files that transformers reads, in the order in which it looks for them."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (directory / name).is_file():
            return [inside(directory / name, directory)]
        index = directory / f"{name}.index.json"
        if index.is_file():
            parts = read_object(inside(index, directory)).get("weight_map")
            if not isinstance(parts, dict) or not all(isinstance(n, str) for n in parts.values()):
                raise ModelError(f"'{index}' has no weight_map of file names")
            paths = [inside(directory / part, directory) for part in sorted(set(parts.values()))]
            return [path for path in paths if path.is_file()]
    return []


def _names(torch: Any, path: Path) -> list[str]:
    """The names of the tensors in a file, of which layers' are floats."""
    dtypes = _dtypes(torch, path)
    for name, dtype in dtypes.items():
        if name.rpartition(".")[2] in WEIGHTS and dtype not in FLOATS:
            raise ModelError(
                f"the weights in '{path}' cannot be loaded: {name} is of {dtype}, as quantized"
                " weights are, which is unsupported",
                objects.IN_FLOATS,
            )
    return list(dtypes)


def _dtypes(torch: Any, path: Path) -> dict[str, str]:
    """The dtype of each tensor in a file, which is not unpickled for anything else."""
    try:
        if path.suffix == ".safetensors":
            (safetensors,) = require("export", "safetensors")
            with safetensors.safe_open(path, framework="pt") as file:
                return {name: file.get_slice(name).get_dtype() for name in list(file.keys())}
        mapped = zipfile.is_zipfile(path)  # the form of old versions of torch is read whole
        content = torch.load(path, map_location="meta", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"the weights in '{path}' cannot be loaded: they are pickled with more than plain"
            " tensors, and unpickling that could run code",
            "save them as model.safetensors where you trust them",
        ) from error
    except Exception as error:  # whatever a damaged file makes the libraries raise
        raise _unloadable(path, error) from error
    plain = isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor)
        for name, tensor in content.items()
    )
    if not plain:
        raise ModelError(
            f"the weights in '{path}' cannot be loaded: they are not a dictionary of tensors",
            "save them with save_pretrained",
        )
    return {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in content.items()}


def _refuse_mismatched(directory: Path, mismatched: Iterable[Any]) -> None:
    for name, held, asked in sorted(mismatched):
        raise ModelError(
            f"the weights in '{directory}' cannot be loaded: {name} has the shape {list(held)},"
            f" config.json says {list(asked)}"
        )


def _unread(model: Any, head: str, unexpected: Iterable[str], held: set[str]) -> list[str]:
    """The tensors that no part of the model takes and that are no other head's."""
    prefix = f"{model.base_model_prefix}."
    whole = {name for name, _ in model.named_modules()}
    inner = {name for name, _ in model.base_model.named_modules()}
    of_heads, of_encoder = (
        tuple(f"{name}." for name in OTHER_HEADS if name not in modules)
        for modules in (whole, inner)
    )
    # Of a file that names its encoder, what stands beside that is no part of it.
    encoder_alone = head == "encoder" and any(name.startswith(prefix) for name in held)
    unread = []
    for name in sorted(unexpected):
        within, short = name.startswith(prefix), name.removeprefix(prefix)
        harmless = (
            short.rpartition(".")[2] in BUFFERS
            or short.startswith(of_encoder if within else of_heads)
            or (encoder_alone and not within)
        )
        if not harmless:
            unread.append(name)
    return unread


def _listed(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(str(name)[:100] for name in names[:most]) + more


def _unloadable(place: Path, error: Exception) -> ModelError:
    return ModelError(f"the weights in '{place}' cannot be loaded: {_reason(error)}")


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else repr(error)
