"""Reads texts, or inputs of the model, as requests to observe a model with."""

from __future__ import annotations

import dataclasses
import math
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bertile import loader
from bertile.base.errors import InputError, ModelError, UsageError
from bertile.onnx.exported import ExportedModel
from bertile.onnx.samples import sample
from bertile.text.tokens import FIELDS, TextTokenizer

Arrays = dict[str, np.ndarray]
Row = dict[str, np.ndarray]  # one sequence: (length,) of each input

SEQUENCES = 512  # taken evenly from a longer file: ranges hardly move after the first hundred
BATCH = 8
MOST_NUMBERS = 1 << 27  # in an .npz, a gigabyte of ids: some hundred sequences are taken of it
LONGEST = 512  # tokens, where the model itself sets no limit


def read_requests(path: Path, exported: ExportedModel) -> list[Arrays]:
    """Requests of some sequences each, by input name, of a calibration file.

    A text file has one text a line, which the model's own tokenizer makes ids of; an .npz file has
    the model's inputs, each (sequences, length). Raises UsageError for a file that is neither,
    ModelError for texts when the model has no tokenizer, InputError for inputs that do not fit.
    """
    return batches(_some(read_rows(path, exported, "calibration file")), exported)


def read_rows(path: Path, exported: ExportedModel, what: str = "file") -> list[Row]:
    """All sequences of a file as `read_requests` takes it, in their order; texts that are longer
    than the model takes are cut. `what` is how errors call the file.
    """
    if not path.is_file():
        raise UsageError(f"there is no {what} '{path}'")
    if path.suffix == ".npz":
        return _arrays(path, exported)
    return _texts(path, exported, what)


def usual_requests(exported: ExportedModel) -> list[Arrays]:
    """Requests where no file was given: English sentences, random ids without a tokenizer."""
    if (exported.directory / "tokenizer.json").is_file():
        from bertile.evaluation.sentences import sentences

        return batches(tokenized(sentences(64), exported), exported)
    length = exported.length or min(64, exported.max_length or 64)
    batch = exported.batch or BATCH
    return [sample(exported.inputs, batch, length, 0, seed) for seed in range(4)]


def tokenized(texts: Sequence[str], exported: ExportedModel) -> list[Row]:
    """The sequences of some texts, cut where they are longer than the model takes."""
    if not (exported.directory / "tokenizer.json").is_file():
        raise ModelError(
            f"'{exported.source}' has no tokenizer.json",
            "give an .npz of its inputs instead of texts",
        )
    limits = (exported.max_length, exported.length, LONGEST)
    limit = min(limit for limit in limits if limit)
    encodings = TextTokenizer(exported.directory, exported.text, limit).encode(texts)
    named = [spec.name for spec in exported.inputs if spec.name in FIELDS]
    return [
        {name: np.array(getattr(encoding, FIELDS[name])) for name in named}
        for encoding in encodings
    ]


def batches(rows: Sequence[Row], exported: ExportedModel) -> list[Arrays]:
    """Join sequences of similar length, padded to the longest, or to the model's static shape.

    A model without attention_mask cannot be given padding: there, only equal lengths are joined.
    """
    masked = any(spec.name == "attention_mask" for spec in exported.inputs)
    size = exported.batch or BATCH
    groups: list[list[Row]] = []
    for row in sorted(rows, key=_length):
        joins = groups and len(groups[-1]) < size
        if joins and (masked or _length(groups[-1][0]) == _length(row)):
            groups[-1].append(row)
        else:
            groups.append([row])
    return [joined(group, exported) for group in groups]


def joined(group: Sequence[Row], exported: ExportedModel) -> Arrays:
    """Sequences as one request, padded to the longest, or to the model's static shape.

    Raises InputError where the model cannot take them: without attention_mask no padding.
    """
    masked = any(spec.name == "attention_mask" for spec in exported.inputs)
    lengths = [_length(row) for row in group]
    width = exported.length or max(lengths)
    for length in lengths:
        if length > width or (length < width and not masked):
            raise InputError(f"a sequence has {length} tokens, the model takes exactly {width}")
    missing = (exported.batch or len(group)) - len(group)
    group = [*group, *[group[-1]] * missing]  # of a static batch, the rest is said again
    arrays = {}
    for spec in exported.inputs:
        arrays[spec.name] = np.zeros((len(group), width), spec.dtype)
        if spec.name not in group[0]:  # which no text says
            if spec.default is None:
                raise InputError(f"no text says what {spec.name} is", "give an .npz of all inputs")
            arrays[spec.name][...] = loader.filled(spec.default, (len(group), width))
            continue
        for index, row in enumerate(group):
            arrays[spec.name][index, : _length(row)] = row[spec.name]
    return arrays


def _length(row: Row) -> int:
    return len(next(iter(row.values())))


def _some(rows: list[Row]) -> list[Row]:
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), SEQUENCES)).astype(int))
    return [rows[index] for index in chosen]


def _texts(path: Path, exported: ExportedModel, what: str) -> list[Row]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"'{path}' is not UTF-8 text: {error.reason}",
            "give a text file with one text a line, or an .npz of the model's inputs",
        ) from error
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise UsageError(f"the {what} '{path}' has no text", "write one text a line")
    return tokenized(texts, exported)


def _arrays(path: Path, exported: ExportedModel) -> list[Row]:
    try:
        _must_be_small(path)
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, NotImplementedError, zipfile.error) as error:
        raise UsageError(f"'{path}' is not an .npz file of arrays: {error}") from error
    except (RuntimeError, zlib.error) as error:  # encrypted, or damaged within
        raise UsageError(f"'{path}' cannot be read: {error}") from error
    specs = [dataclasses.asdict(spec) for spec in exported.inputs]
    inputs = loader.check_inputs(arrays, specs, exported.max_length)
    shape = next(iter(inputs.values())).shape
    for spec in exported.inputs:
        if spec.name not in inputs:
            inputs[spec.name] = np.broadcast_to(loader.filled(spec.default, shape), shape)
    return [{name: array[index] for name, array in inputs.items()} for index in range(shape[0])]


def _must_be_small(path: Path) -> None:
    """Refuse an .npz by what its arrays' headers say, since numpy makes room for that at once."""
    numbers = 0
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            with archive.open(info) as file:
                version = np.lib.format.read_magic(file)
                header = {
                    (1, 0): np.lib.format.read_array_header_1_0,
                    (2, 0): np.lib.format.read_array_header_2_0,
                }.get(version)
                if header is None:
                    raise ValueError(f"{info.filename} is of the unknown version {version}")
                shape, _, dtype = header(file)
                size = math.prod(shape)
                if size * dtype.itemsize != info.file_size - file.tell():
                    raise ValueError(f"{info.filename} has not the size that it says")
                numbers += size
    if numbers > MOST_NUMBERS:
        raise UsageError(
            f"'{path}' holds {numbers:,} numbers, more than {MOST_NUMBERS:,}",
            f"{SEQUENCES} sequences are enough: give fewer",
        )
