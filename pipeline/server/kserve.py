"""Reads requests of KServe's protocol 2 and forms its answers, in JSON or with binary tensors.

The forms are those of the Open Inference Protocol (inference_rest.md in
kserve/open-inference-protocol) and of Triton's extension for binary tensors
(extension_binary_data.md): a JSON object, and behind it the bytes of tensors, one after the other;
a header says how long the JSON is.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import orjson

from bertile.base.errors import InputError, nearest

HEADER = "inference-header-content-length"
TEXTS = "BYTES"
# How a body may be compressed, as zlib calls it.
WINDOWS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
NUMBERS: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
NAMES = {dtype: name for name, dtype in NUMBERS.items()}
LENGTH_BYTES = 4  # that say how long an element of BYTES is, in front of it


class Asked(NamedTuple):
    """An output that a client asks for by name, in JSON or `binary`."""

    name: str
    binary: bool


@dataclass(frozen=True)
class Request:
    """What a client sends: tensors by name, those of BYTES as arrays of `bytes`.

    `outputs` are those that it asks for; none means all, and `binary` says in which form.
    """

    inputs: dict[str, np.ndarray]
    id: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    outputs: tuple[Asked, ...] = ()
    binary: bool = False


class Answer(NamedTuple):
    """A body, and how many bytes of it are JSON where binary tensors follow."""

    body: bytes
    header_length: int | None


def read(body: bytes, header_length: str | None = None) -> Request:
    """The request in a body; `header_length` is what the header of that name says, if it is there.

    Raises InputError for whatever the protocol does not allow.
    """
    size = _header_size(header_length, len(body))
    rest = memoryview(body)[size:]
    message = _json_object(body[:size])
    parameters = _mapping(message, "parameters", "the request")
    entries = message.get("inputs")
    if not isinstance(entries, list) or not entries:
        raise InputError("the request has no list of inputs")
    inputs: dict[str, np.ndarray] = {}
    for entry in entries:
        name = _name(entry, "an input")
        if name in inputs:
            raise InputError(f"the input '{name}' is there twice")
        inputs[name], rest = _tensor(name, entry, rest)
    if len(rest):
        raise InputError(f"{len(rest)} bytes follow the tensors")
    binary = _flag(parameters, "binary_data_output", "the request")
    identity = message.get("id")
    if identity is not None and not isinstance(identity, str):
        raise InputError("the id of the request is no string")
    outputs = tuple(_asked(message.get("outputs"), binary))
    return Request(inputs, identity, parameters, outputs, binary)


def plain(body: bytes, encoding: str, most: int) -> bytes:
    """A body without its compression; InputError for one that is not "gzip" or "deflate", or is
    broken, or has more than `most` bytes.
    """
    if encoding not in WINDOWS:
        raise InputError(f"the body is encoded by '{encoding}'", f"known: {', '.join(WINDOWS)}")
    reader = zlib.decompressobj(WINDOWS[encoding])
    try:
        text = reader.decompress(body, most + 1)
    except zlib.error as error:
        raise InputError(f"the body is not encoded by {encoding}: {error}") from error
    if len(text) > most:
        raise InputError(f"the body has more than {most} bytes")
    if not reader.eof:
        raise InputError(f"the body ends in the middle of its {encoding}")
    return text


def wanted(request: Request, names: Iterable[str]) -> tuple[Asked, ...]:
    """The outputs to answer with, of a model that has those `names`.

    Raises InputError for an output that it lacks.
    """
    known = tuple(names)
    for asked in request.outputs:
        if asked.name not in known:
            raise InputError(f"output '{asked.name}' is unknown{nearest(asked.name, known)}")
    return request.outputs or tuple(Asked(name, request.binary) for name in known)


def answer(
    model: str, request: Request, asked: Iterable[Asked], outputs: Mapping[str, np.ndarray]
) -> Answer:
    """The answer to a request: the tensors that are `asked` for, in their order."""
    entries, pieces = [], []
    for name, binary in asked:
        array = outputs[name]
        entry: dict[str, Any] = {
            "name": name,
            "shape": list(array.shape),
            "datatype": TEXTS if array.dtype.kind == "O" else NAMES[array.dtype],
        }
        if binary:
            piece = as_bytes(array)
            entry["parameters"] = {"binary_data_size": len(piece)}
            pieces.append(piece)
        else:
            entry["data"] = _as_json(array)
        entries.append(entry)
    message: dict[str, Any] = {"model_name": model, "outputs": entries}
    if request.id is not None:
        message["id"] = request.id
    header = orjson.dumps(message, option=orjson.OPT_SERIALIZE_NUMPY)
    return Answer(b"".join([header, *pieces]), len(header) if pieces else None)


def texts(array: np.ndarray, name: str) -> list[str]:
    """The texts of a tensor of BYTES of shape (n,) or (n, 1), as Triton's ensembles hand them on.

    Raises InputError for another shape or datatype, and for what is not UTF-8.
    """
    if array.dtype.kind != "O":
        raise InputError(f"the input '{name}' has the datatype {NAMES[array.dtype]}, not {TEXTS}")
    if array.ndim not in (1, 2) or (array.ndim == 2 and array.shape[1] != 1):
        raise InputError(f"the input '{name}' has the shape {list(array.shape)}, not [n] or [n, 1]")
    try:
        return [element.decode() for element in array.reshape(-1)]
    except UnicodeDecodeError as error:
        raise InputError(f"the input '{name}' has a text that is not UTF-8") from error


def token_ids(inputs: Mapping[str, np.ndarray]) -> list[list[int]]:
    """The ids of each text, of `input_ids` (n, length) and, where there is one, `attention_mask`.

    Padding stands behind a text, and `token_type_ids` are zero, as those of a text by itself are.
    Raises InputError for other shapes, datatypes and values.
    """
    ids = _rows(inputs, "input_ids")
    if "token_type_ids" in inputs and _rows(inputs, "token_type_ids").any():
        raise InputError("token_type_ids are not zero", "send a pair as text and text_pair")
    if "attention_mask" not in inputs:
        return ids.tolist()
    mask = _rows(inputs, "attention_mask")
    if mask.shape != ids.shape:
        raise InputError(f"attention_mask is {list(mask.shape)}, input_ids is {list(ids.shape)}")
    lengths = mask.sum(axis=1)
    if not np.array_equal(mask, np.arange(ids.shape[1]) < lengths[:, None]):
        raise InputError("attention_mask is not ones, and zeros behind them")
    return [row[:length].tolist() for row, length in zip(ids, lengths)]


def as_bytes(array: np.ndarray) -> bytes:
    """A tensor as the binary extension has it: row-major, little-endian; of BYTES each element
    behind its length.
    """
    if array.dtype.kind != "O":
        return np.ascontiguousarray(array, NUMBERS[NAMES[array.dtype]]).tobytes()
    elements = [_encoded(value) for value in array.reshape(-1)]
    return b"".join(_length(element) + element for element in elements)


def _length(element: bytes) -> bytes:
    return len(element).to_bytes(LENGTH_BYTES, "little")


def _encoded(value: bytes | str) -> bytes:
    return value.encode() if isinstance(value, str) else value


def _as_json(array: np.ndarray) -> Any:
    if array.dtype.kind == "O":
        return [_encoded(value).decode() for value in array.reshape(-1)]
    if array.dtype == NUMBERS["FP16"]:
        array = array.astype(np.float32)
    return np.ascontiguousarray(array).reshape(-1)


def _header_size(header_length: str | None, whole: int) -> int:
    if header_length is None:
        return whole
    if not (header_length.isascii() and header_length.isdigit()) or int(header_length) > whole:
        raise InputError(f"{HEADER} is '{header_length}', the body has {whole} bytes")
    return int(header_length)


def _json_object(text: bytes) -> dict[str, Any]:
    try:
        message = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InputError(f"the request is no JSON: {error}") from error
    if not isinstance(message, dict):
        raise InputError("the request is no JSON object")
    return message


def _mapping(entry: dict[str, Any], key: str, what: str) -> dict[str, Any]:
    value = entry.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{key} of {what} is no object")
    return value


def _flag(parameters: dict[str, Any], key: str, what: str, default: bool = False) -> bool:
    value = parameters.get(key, default)
    if not isinstance(value, bool):
        raise InputError(f"{key} of {what} is neither true nor false")
    return value


def _name(entry: Any, what: str) -> str:
    name = entry.get("name") if isinstance(entry, dict) else None
    if not isinstance(name, str) or not name:
        raise InputError(f"{what} has no name")
    return name


def _asked(entries: Any, binary: bool) -> Iterable[Asked]:
    if entries is None:
        return
    if not isinstance(entries, list):
        raise InputError("the outputs of the request are no list")
    for entry in entries:
        name = _name(entry, "an output")
        parameters = _mapping(entry, "parameters", f"the output '{name}'")
        if parameters.get("classification"):
            raise InputError(
                f"the output '{name}' is asked for as a classification",
                "ask for its numbers, or call /predict",
            )
        yield Asked(name, _flag(parameters, "binary_data", f"the output '{name}'", binary))


def _tensor(name: str, entry: dict[str, Any], rest: memoryview) -> tuple[np.ndarray, memoryview]:
    """The array of an input, and the bytes that are left for the next ones."""
    shape, datatype = entry.get("shape"), entry.get("datatype")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise InputError(f"the shape of the input '{name}' is no list of whole numbers")
    if datatype not in (TEXTS, *NUMBERS):
        raise InputError(
            f"the input '{name}' has the datatype {datatype!r}",
            f"known: {', '.join((TEXTS, *NUMBERS))}",
        )
    size = _mapping(entry, "parameters", f"the input '{name}'").get("binary_data_size")
    if size is None:
        array = _of_json(name, datatype, entry.get("data"))
    elif type(size) is not int or not 0 <= size <= len(rest):
        raise InputError(
            f"the input '{name}' says that it has {size!r} bytes, {len(rest)} are there"
        )
    else:
        array = _of_bytes(name, datatype, rest[:size])
        rest = rest[size:]
    # flat, or as the shape says; numbers of any size are compared before numpy sees them
    if array.size != math.prod(shape) or (array.ndim > 1 and list(array.shape) != shape):
        sizes = list(array.shape) if array.ndim > 1 else f"{array.size} elements"
        raise InputError(f"the input '{name}' has the shape {shape}, its data {sizes}")
    return array.reshape(shape), rest


def _of_json(name: str, datatype: str, data: Any) -> np.ndarray:
    if not isinstance(data, list):
        raise InputError(f"the data of the input '{name}' is no list")
    try:
        array = np.array(data, object if datatype == TEXTS else None)
    except ValueError as error:  # lists of different lengths
        raise InputError(f"the data of the input '{name}' is no tensor") from error
    if datatype == TEXTS:
        flat = array.reshape(-1)
        if not all(isinstance(element, str) for element in flat):
            raise InputError(f"the data of the input '{name}' has what is no string")
        encoded = np.empty(flat.size, object)
        encoded[:] = [element.encode() for element in flat]
        return encoded.reshape(array.shape)
    dtype = NUMBERS[datatype]
    if not array.size:
        return array.astype(dtype)
    if array.dtype.kind not in _TAKEN[dtype.kind]:
        raise InputError(f"the data of the input '{name}' is not of the datatype {datatype}")
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
            raise InputError(f"the data of the input '{name}' is too large for {datatype}")
    return array.astype(dtype)


# Of a JSON list's numbers, as numpy reads them, the kinds that a datatype takes.
_TAKEN = {"b": "b", "i": "iu", "u": "iu", "f": "iuf"}


def _of_bytes(name: str, datatype: str, piece: memoryview) -> np.ndarray:
    if datatype == TEXTS:
        elements = list(_elements(name, piece))
        array = np.empty(len(elements), object)
        array[:] = elements
        return array
    dtype = NUMBERS[datatype]
    if len(piece) % dtype.itemsize:
        raise InputError(f"the input '{name}' has {len(piece)} bytes: no whole number of elements")
    return np.frombuffer(piece, dtype)


def _elements(name: str, piece: memoryview) -> Iterable[bytes]:
    place = 0
    while place < len(piece):
        start = place + LENGTH_BYTES
        size = int.from_bytes(piece[place:start], "little")
        place = start + size
        if place > len(piece):
            raise InputError(f"the input '{name}' ends in the middle of an element")
        yield bytes(piece[start:place])


def _rows(inputs: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    array = inputs[name]
    if array.dtype.kind not in "iu" or array.ndim != 2:
        datatype = TEXTS if array.dtype.kind == "O" else NAMES[array.dtype]
        raise InputError(
            f"the input '{name}' is {datatype} {list(array.shape)}, not INT64 [n, length]"
        )
    return array.astype(np.int64)
