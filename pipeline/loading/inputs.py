"""Checks what a model is called with: names, types, shapes, and ids that the model has."""

from __future__ import annotations

import difflib
import traceback

import numpy as np

from bertile.loading.boxes import check_boxes, sides
from bertile.loading.errors import InputError
from bertile.loading.ragged import MASK, squared, warn_of_padding

FILL = {"ones": 1, "zeros": 0}
PLACES = "places"  # 0, 1, 2, …
# What tokenizers give to every model: one that has no such input takes what changes nothing.
NEUTRAL = {"attention_mask": "ones", "token_type_ids": "zeros", "position_ids": PLACES}


FEW = 64  # integers, of which Python knows the extremes before numpy has begun
_WORDS = {"ones": "all ones", "zeros": "all zeros", PLACES: "0, 1, 2, …"}


def filled(default: str | None, shape: tuple[int, int]):
    """What an input (batch, length) is where the caller leaves it out: a number, or an array."""
    if default == PLACES:
        return np.broadcast_to(np.arange(shape[1]), shape)
    return FILL.get(default)


def check_inputs(
    inputs: dict, specs: list[dict], max_length: int | None, padding_id: int | None = None
) -> dict:
    """Return the given inputs as integer arrays of one shape (batch, length), checked.

    Rows of unequal lengths are padded, and masked; boxes become an input for each side. Where a
    `padding_id` is known, a batch that has it at an end of a row, and no mask, is warned of.
    """
    inputs = squared(sides(inputs, specs), specs)
    known, extra = {spec["name"]: spec for spec in specs}, {}
    if not inputs.keys() <= known.keys():
        others = {name: inputs[name] for name in inputs if name in NEUTRAL and name not in known}
        inputs = {name: value for name, value in inputs.items() if name not in others}
        extra = {n: _integers(n, value) for n, value in others.items() if value is not None}
    arrays = {name: _integers(name, value) for name, value in check_names(inputs, specs).items()}
    first, shape = next((name, array.shape) for name, array in arrays.items())
    if 0 in shape:
        raise InputError(f"{first} has shape {shape}", "give at least one row and one token")
    for name, array in {**arrays, **extra}.items():
        if array.shape != shape:
            raise InputError(f"{name} has shape {array.shape}, but {first} has {shape}")
    for name, array in extra.items():
        if not np.array_equal(array, np.broadcast_to(filled(NEUTRAL[name], shape), shape)):
            what = f"the model has no input '{name}', which is not {_WORDS[NEUTRAL[name]]}"
            raise InputError(what, f"known: {', '.join(known)}")
    check_length(shape[1], max_length)
    for name, array in arrays.items():
        _check_range(name, array, known[name])
    check_boxes(arrays)
    if padding_id is not None and MASK not in arrays:
        warn_of_padding(arrays["input_ids"], padding_id)
    return arrays


def check_names(inputs: dict, specs: list[dict]) -> dict:
    """Return the inputs that are not None; raises InputError for a wrong or missing name."""
    known = [spec["name"] for spec in specs]
    for name in inputs:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            question = f"did you mean '{near[0]}'? " if near else ""
            raise InputError(
                f"the model has no input '{name}'", f"{question}known: {', '.join(known)}"
            )
    named = {name: value for name, value in inputs.items() if value is not None}
    for spec in specs:
        if spec["name"] not in named and spec["default"] is None:
            raise InputError(f"the input {spec['name']} is missing")
    if not named:
        raise InputError("no input was given", f"known: {', '.join(known)}")
    return named


def check_length(length: int, limit: int | None) -> None:
    """Raise InputError for more tokens than the model takes."""
    if limit is not None and length > limit:
        raise InputError(
            f"the input has {length} tokens, the model takes at most {limit}",
            "shorten or split the text",
        )


def _integers(name: str, value) -> np.ndarray:
    if type(value) is np.ndarray and value.ndim == 2 and value.dtype.kind in "iub":
        return value
    try:
        array = np.asarray(value)
    except Exception as error:  # of numpy, or of what gives the values: torch, jax, a caller's own
        said = traceback.format_exception_only(type(error), error)[-1].split("\n")[0]
        if "setting an array element with a sequence" in said:  # rows of unequal length
            raise InputError(
                f"{name} is not rectangular", "pad every row to one length, with attention_mask 0"
            ) from error
        raise InputError(f"{name} cannot be read as an array: {said[:300]}") from error
    if array.ndim == 2 and array.dtype.kind in "iub":
        return array
    if array.ndim != 2:
        raise InputError(
            f"{name} has {array.ndim} dimension{'s' * (array.ndim != 1)}",
            "give (batch, length), for one text [ids]",
        )
    if array.dtype == object and array.size:  # numpy older than 1.24 makes this of ragged lists
        raise InputError(f"{name} holds values that are not 64-bit integers")
    if name == "attention_mask" and array.dtype.kind == "f" and np.isin(array, (0, 1)).all():
        array = array.astype(np.int64)
    if array.dtype.kind not in "iub" and array.size:
        raise InputError(f"{name} has dtype {array.dtype}", "give integers")
    return array


def _check_range(name: str, array: np.ndarray, spec: dict) -> None:
    below = spec["below"]
    limit = np.iinfo(spec["dtype"]).max if below is None else below - 1
    low, high = _extremes(array)
    if low >= 0 and high <= limit:
        return
    wrong = low if low < 0 else high
    row, column = np.argwhere(array == wrong)[0]
    raise InputError(f"{name}[{row}, {column}] is {wrong}, the model takes 0 to {limit}")


def _extremes(array: np.ndarray) -> tuple[int, int]:
    """The smallest and the largest of an array of integers or truth values."""
    if array.size <= FEW:
        numbers = array.ravel().tolist()
        return int(min(numbers)), int(max(numbers))
    if array.dtype == bool:
        array = array.view(np.uint8)
    return int(array.min()), int(array.max())
