"""Writes answers into a file as they come: JSON lines, or arrays as .npy and .npz.

What has been written when a run is stopped stays and can be read.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, BinaryIO, NamedTuple

import numpy as np

from bertile.base.errors import BertileError, UsageError

NPY, NPZ, JSON = ENDINGS = (".npy", ".npz", ".jsonl")
HEADER = 128  # bytes in front of an .npy's numbers: room for any shape
STAMP = 512  # rows after which the header of an .npy says how many there are


def as_json(record: dict[str, Any]) -> str:
    """A record as a line of JSON; arrays are lists, of as many digits as float32 has."""
    return json.dumps(record, default=_plain, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype == np.float32:
        if value.ndim > 1:
            return [_plain(row) for row in value]
        return [float(f"{number:.9g}") for number in value.tolist()]
    if isinstance(value, np.float32):
        return float(f"{value:.9g}")
    return value.tolist()


class Form(NamedTuple):
    """What the answers of a run are as arrays: `kind` "rows", of the same shape each; "tokens",
    (tokens, d) of each text; "sparse" vectors; or "none". `name` is that of the array in an .npz,
    beside those that are `whole`.
    """

    kind: str
    name: str = ""
    whole: Mapping[str, np.ndarray] = MappingProxyType({})

    @property
    def endings(self) -> tuple[str, ...]:
        """Of the files that can hold such answers."""
        if self.kind == "rows":
            return ENDINGS
        return (JSON,) if self.kind == "none" else (NPZ, JSON)


class ResultFile:
    """The file of a run's answers: a context manager, which finishes it however the block ends.

    A file that is there already stays as it is until the first answer. Raises UsageError for an
    ending that does not fit the form, BertileError for what the system refuses.
    """

    def __init__(self, path: str, form: Form) -> None:
        self._path, self._form = path, form
        self._ending = ending_of(path)
        if self._ending not in form.endings:
            endings = ", ".join(form.endings)
            raise UsageError(f"{self._ending} cannot hold these answers", f"name it {endings}")

    def __enter__(self) -> ResultFile:
        with self._explained():
            self._file = os.fdopen(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
            self._writer = _writer(self._file, self._path, self._ending, self._form)
        return self

    def write(self, record: dict[str, Any], array: Any) -> None:
        """Add an answer: as JSON, and as an array of the form."""
        with self._explained():
            self._writer.write(record, array)

    def __exit__(self, *exception: object) -> None:
        with self._explained(), self._file:
            try:
                self._writer.close()
                self._file.flush()
            finally:
                status = os.fstat(self._file.fileno())
                if stat.S_ISREG(status.st_mode) and not status.st_size:
                    Path(self._path).unlink()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise BertileError(
                f"cannot write '{self._path}': {error.strerror or error}", "choose another file"
            ) from error


def ending_of(path: str) -> str:
    """The ending of a file of answers; UsageError for another."""
    ending = os.path.splitext(path)[1].lower()
    if ending not in ENDINGS:
        raise UsageError(f"'{path}' is no file of answers", f"name it {', '.join(ENDINGS)}")
    return ending


def _writer(file: BinaryIO, path: str, ending: str, form: Form) -> Any:
    if ending == JSON:
        return JsonLines(file)
    if ending == NPY:
        return Npy(file)
    kinds = {"rows": RowsNpz, "tokens": TokensNpz, "sparse": SparseNpz}
    return kinds[form.kind](file, os.path.dirname(os.path.abspath(path)), form)


class JsonLines:
    """Writes a record a line."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._begun = file, False

    def write(self, record: dict[str, Any], array: Any) -> None:
        """Write a record."""
        if not self._begun:
            self._file.truncate(0)
            self._begun = True
        self._file.write(as_json(record).encode() + b"\n")

    def close(self) -> None:
        """Nothing is left to say."""


class Npy:
    """Writes rows of one shape and dtype as an array (rows, …), whose header counts them."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._count = file, 0
        self._like: np.ndarray | None = None  # none of the rows, of their shape and dtype

    def write(self, record: dict[str, Any], array: np.ndarray) -> None:
        """Write a row."""
        self.extend(array[None])

    def extend(self, rows: np.ndarray) -> None:
        """Write several rows."""
        if self._like is None:
            self._like = rows[:0].copy()
            self._file.truncate(0)
            self._file.write(self._header())
        self._file.write(np.ascontiguousarray(rows).tobytes())
        before, self._count = self._count, self._count + len(rows)
        if before // STAMP != self._count // STAMP:
            self.close()

    def close(self) -> None:
        """Say in the header how many rows there are; more may follow."""
        if self._like is not None:
            self._file.seek(0)
            self._file.write(self._header())
            self._file.seek(0, os.SEEK_END)

    def _header(self) -> bytes:
        """Of version 1.0 of NumPy's format, always of the same size."""
        assert self._like is not None
        about = {
            "descr": np.lib.format.dtype_to_descr(self._like.dtype),
            "fortran_order": False,
            "shape": (self._count, *self._like.shape[1:]),
        }
        magic = np.lib.format.magic(1, 0)
        size = HEADER - len(magic) - 2
        return magic + size.to_bytes(2, "little") + f"{about!r:<{size - 1}}\n".encode("latin-1")


class Npz:
    """Writes arrays that grow into an .npz, by way of files without a name in `directory`."""

    def __init__(self, file: BinaryIO, directory: str, form: Form) -> None:
        self._file, self._directory, self._form = file, directory, form
        self._growing: dict[str, tuple[Npy, IO[bytes]]] = {}

    def extend(self, name: str, rows: np.ndarray) -> None:
        """Write rows of an array."""
        if name not in self._growing:
            beside = tempfile.TemporaryFile(dir=self._directory)
            self._growing[name] = (Npy(beside), beside)
        self._growing[name][0].extend(rows)

    def finish(self, whole: Mapping[str, Any]) -> None:
        """Put the arrays into the file, and those that are whole; nothing where none has begun."""
        if not self._growing:
            return
        self._file.truncate(0)
        with zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED) as archive:
            for name, (array, beside) in self._growing.items():
                array.close()
                beside.seek(0)
                with beside, archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    shutil.copyfileobj(beside, member)
            for name, values in whole.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.asanyarray(values), allow_pickle=False)


class RowsNpz(Npz):
    """Writes rows of one shape as a single array."""

    def write(self, record: dict[str, Any], array: np.ndarray) -> None:
        """Write a row."""
        self.extend(self._form.name, array[None])

    def close(self) -> None:
        """Put the array into the file."""
        self.finish(self._form.whole)


class TokensNpz(Npz):
    """Writes (tokens, d) of texts as an array of all tokens, with `starts` (texts + 1,), where each
    text begins and the last ends.
    """

    def __init__(self, file: BinaryIO, directory: str, form: Form) -> None:
        super().__init__(file, directory, form)
        self._starts = [0]

    def write(self, record: dict[str, Any], array: np.ndarray) -> None:
        """Write the rows of a text."""
        self.extend(self._form.name, array)
        self._starts.append(self._starts[-1] + len(array))

    def close(self) -> None:
        """Put the array and where its texts begin into the file."""
        self.finish({"starts": np.asarray(self._starts, np.int64)})


class SparseNpz(Npz):
    """Writes sparse vectors as the rows of a matrix that `scipy.sparse.load_npz` reads."""

    def __init__(self, file: BinaryIO, directory: str, form: Form) -> None:
        super().__init__(file, directory, form)
        self._starts, self._size = [0], 0

    def write(self, record: dict[str, Any], array: Any) -> None:
        """Write a `SparseVector`."""
        self.extend("indices", array.indices)
        self.extend("data", array.values)
        self._starts.append(self._starts[-1] + len(array.indices))
        self._size = array.size

    def close(self) -> None:
        """Put the matrix into the file."""
        shape = np.asarray([len(self._starts) - 1, self._size])
        starts = np.asarray(self._starts, np.int64)
        self.finish({"indptr": starts, "shape": shape, "format": np.asarray(b"csr")})
