"""Reads a model's config.json for all who ask it, and refuses values that no encoder can have.

A config comes from anywhere: types and bounds are checked before anything is built of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bertile.base.errors import ModelError
from bertile.families import table

NAME = "config.json"
LARGEST = 1 << 26  # bytes: half a million labels take a quarter of it
DEEPEST = 16  # levels of objects and lists; real ones have three

Check = Callable[[Any], str]  # says what is expected, or "" where the value will do


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ModelError, with the path, for anything else."""
    try:
        if path.exists() and not path.is_file():
            raise ModelError(f"'{path}' is not a file")
        if path.stat().st_size > LARGEST:
            raise ModelError(f"'{path}' is larger than {LARGEST >> 20} MiB")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"'{path}' cannot be read: {error}") from error
    except RecursionError as error:
        raise ModelError(f"'{path}' cannot be read: it is nested too deep") from error
    if not isinstance(value, dict):
        raise ModelError(f"'{path}' is not a JSON object, but of type {type(value).__name__}")
    if _deeper(value, DEEPEST):
        raise ModelError(f"'{path}' cannot be read: it is nested too deep")
    return value


def read(directory: Path) -> dict[str, Any]:
    """The checked config.json of a checkpoint; ModelError for what no model can be made of.

    Of a type without a row the sizes alone are checked, where they are whole numbers.
    """
    path = directory / NAME
    if not path.exists():
        raise ModelError(
            f"'{directory}' has no config.json", "give the directory that save_pretrained wrote"
        )
    config = read_object(path)
    _check(config, path, {"model_type": _TEXT})
    if not config.get("model_type"):
        raise ModelError(
            f"'{path}' does not say of what model_type the model is",
            "save the model with save_pretrained of transformers",
        )
    if table.of_type(config["model_type"]) is None:  # another's fields may mean something else
        _check(config, path, {**_BESIDE, **_WHOLE, **_FORMS})
        return config
    _check(config, path, {**_BESIDE, **_SIZES, **_CHECKS, **_FORMS})
    padding, vocabulary = config.get("pad_token_id"), config.get("vocab_size")
    if padding is not None and vocabulary is not None and padding >= vocabulary:
        raise ModelError(
            f"'{path}' says pad_token_id {padding}, but its vocab_size is {vocabulary}"
        )
    return config


def beside(directory: Path) -> dict[str, Any]:
    """The config.json in `directory`, {} without one; checked is what `labels`, `padding_id` and
    the normalizer take of it, since an ONNX file's may be of a model that we know nothing of.
    """
    path = directory / NAME
    if not path.exists():
        return {}
    config = read_object(path)
    _check(config, path, _BESIDE)
    return config


def padding_id(config: Mapping[str, Any]) -> int:
    """The id that fills rows; 0 where there is none, which is also how -1 is meant."""
    return max(0, config.get("pad_token_id") or 0)


def labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of a classifier's outputs, in their order."""
    names = config.get("id2label") or {}
    return tuple(str(names[key]) for key in sorted(names, key=int))


def _check(config: Mapping[str, Any], path: Path, checks: Mapping[str, Check]) -> None:
    for key, check in checks.items():
        if key in config and (expected := check(config[key])):
            shown = repr(config[key])
            shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
            raise ModelError(f"'{path}' says {key} {shown}", f"expected is {expected}")


def _deeper(value: Any, levels: int) -> bool:
    if not isinstance(value, (dict, list)):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_deeper(part, levels - 1) for part in inner)


def _count(least: int, most: int, optional: bool = False) -> Check:
    def check(value: Any) -> str:
        whole = isinstance(value, int) and not isinstance(value, bool)
        if (value is None and optional) or (whole and least <= value <= most):
            return ""
        return f"a whole number from {least} to {most}"

    return check


def _number(value: Any) -> str:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return "" if plain and math.isfinite(value) and 0 <= value <= 1 else "a number from 0 to 1"


def _if_whole(check: Check) -> Check:
    return lambda value: check(value) if type(value) is int and value > 0 else ""


def _one_of(kinds: tuple[type, ...], expected: str) -> Check:
    return lambda value: "" if value is None or isinstance(value, kinds) else expected


def _rope(value: Any) -> str:
    """Parameters of rotary positions, or such by the kind of layer."""
    kinds = [value, *value.values()] if isinstance(value, dict) else [value]
    parts = [part for part in kinds if isinstance(part, dict)]
    bases = [part["rope_theta"] for part in parts if part.get("rope_theta") is not None]
    fits = (value is None or parts) and not any(map(_base, bases))
    return "" if fits else "an object of parameters of rotary positions"


def _base(value: Any) -> str:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return "" if plain and 1 < value < 1e12 else "a number above 1"


def _positive(value: Any) -> str:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return "" if value is None or (plain and 0 < value < 1e12) else "a number above 0"


def _names(value: Any) -> str:
    fits = value is None or (isinstance(value, list) and all(isinstance(n, str) for n in value))
    return "" if fits else "a list of names"


def _by_index(value: Any) -> str:
    fits = value is None or (
        isinstance(value, dict)
        and all(key.isdecimal() and len(key) < 10 for key in value)
        and all(isinstance(name, (str, int, float)) for name in value.values())
    )
    return "" if fits else "an object of names by their number"


def _heads_by_layer(value: Any) -> str:
    fits = value is None or (
        isinstance(value, dict)
        and all(key.isdecimal() and len(key) < 10 for key in value)
        and all(isinstance(heads, list) for heads in value.values())
        and all(isinstance(head, int) and head >= 0 for heads in value.values() for head in heads)
    )
    return "" if fits else "an object of lists of heads by their layer"


_TEXT = _one_of((str,), "a name")
_FLAG = _one_of((bool,), "true or false")
_OBJECT = _one_of((dict,), "an object")
_WIDTH, _ROWS = _count(1, 1 << 16), _count(1, 1 << 24)
_LAYERS, _HEADS = _count(1, 1000), _count(1, 1 << 12)

_BESIDE: dict[str, Check] = {
    "model_type": _TEXT,
    "max_position_embeddings": _ROWS,
    "pad_token_id": _count(-1, 1 << 24, optional=True),
    "id2label": _by_index,
    "problem_type": _TEXT,
}
_SIZES: dict[str, Check] = {
    **dict.fromkeys(("num_hidden_layers", "n_layers", "num_hidden_groups", "n_layer"), _LAYERS),
    "inner_group_num": _LAYERS,
    **dict.fromkeys(("num_attention_heads", "n_heads", "n_head"), _HEADS),
    "num_key_value_heads": _count(1, 1 << 12, optional=True),
    "head_dim": _count(1, 1 << 16, optional=True),
    **dict.fromkeys(("hidden_size", "dim", "embedding_size", "n_embd"), _WIDTH),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size"), _WIDTH),
    **dict.fromkeys(("intermediate_size", "hidden_dim"), _count(1, 1 << 18)),
    "n_inner": _count(1, 1 << 18, optional=True),
    **dict.fromkeys(("vocab_size", "n_positions"), _ROWS),
    "type_vocab_size": _count(0, 1 << 16),
    "task_type_vocab_size": _count(1, 1 << 16),
    "local_attention": _count(2, 1 << 20),
    "sliding_window": _count(1, 1 << 24, optional=True),
    "global_attn_every_n_layers": _count(1, 1000),
    "max_2d_position_embeddings": _count(1, 1 << 20),
    "relative_attention_num_buckets": _count(1, 1 << 16),
    **dict.fromkeys(("num_labels", "_num_labels"), _count(1, 1 << 24, optional=True)),
}
_WHOLE = {
    name: _if_whole(check) for name, check in {"max_position_embeddings": _ROWS, **_SIZES}.items()
}
_FORMS: dict[str, Check] = {
    "architectures": _names,
    "auto_map": _OBJECT,
    "quantization_config": _OBJECT,
    "label2id": _OBJECT,
    "position_embedding_type": _TEXT,
    "is_decoder": _FLAG,
}
_CHECKS: dict[str, Check] = {
    "hidden_act": _TEXT,
    "activation": _TEXT,
    **dict.fromkeys(("layer_norm_eps", "norm_eps"), _number),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_epsilon"), _number),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), _positive),
    "query_pre_attn_scalar": _positive,
    **dict.fromkeys(("use_bidirectional_attention", "use_sliding_window"), _FLAG),
    **dict.fromkeys(("scale_attn_weights", "scale_attn_by_inverse_layer_idx"), _FLAG),
    **dict.fromkeys(("hidden_activation", "classifier_activation", "classifier_pooling"), _TEXT),
    **dict.fromkeys(("norm_bias", "attention_bias", "mlp_bias"), _FLAG),
    **dict.fromkeys(("decoder_bias", "classifier_bias"), _FLAG),
    "layer_types": _names,
    "rope_parameters": _rope,
    **dict.fromkeys(("global_rope_theta", "local_rope_theta"), _base),
    "add_cross_attention": _FLAG,
    "pruned_heads": _heads_by_layer,
}
