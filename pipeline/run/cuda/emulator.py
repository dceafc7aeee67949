"""Runs CUDA kernels on the CPU, with every access to memory checked, and counted where asked."""

from __future__ import annotations

import _ctypes
import ctypes
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bertile.cuda_loader import evaluate
from bertile.run.cuda.host_compiler import EmulationError, build, kept, missing
from bertile.schedules.cuda.source import Kernel

__all__ = [
    "Emulated",
    "EmulationError",
    "Traffic",
    "aligned",
    "build",
    "count_traffic",
    "kept",
    "missing",
    "run_kernel",
]

Argument = np.ndarray | np.generic

WAYS = (
    "shared read",
    "shared write",
    "global read",
    "global write",
    "copy_async read",
    "load_matrix read",
)
_APART = 1 << 16


class Emulated:
    """The entries of a library that `build` made."""

    def __init__(self, path: Path, seed: int = 0) -> None:
        self._library = ctypes.CDLL(str(path))
        weakref.finalize(self, _ctypes.dlclose, self._library._handle)
        self._library.emulated_error.restype = ctypes.c_char_p
        self._library.emulated_seed(ctypes.c_uint64(seed))
        self._lock = threading.Lock()

    def launch(
        self,
        entry: str,
        grid: Sequence[int],
        threads: int,
        shared: int,
        arguments: Sequence[Argument],
    ) -> None:
        """Run one launch; arrays are written in place, scalars must have the parameter's dtype.

        Raises EmulationError with what the kernel did wrong.
        """
        with self._lock:
            self._launch(entry, grid, threads, shared, arguments)

    @contextmanager
    def counting(self) -> Iterator[Callable[[], list[int]]]:
        """Launches inside count what they move; the function that is given reads the counts."""
        numbers = (ctypes.c_uint64 * (4 * len(WAYS) + 1))()

        def counts() -> list[int]:
            self._library.emulated_counts(numbers)
            return list(numbers)

        self._library.emulated_count(1)
        try:
            yield counts
        finally:
            self._library.emulated_count(0)

    def _launch(
        self,
        entry: str,
        grid: Sequence[int],
        threads: int,
        shared: int,
        arguments: Sequence[Argument],
    ) -> None:
        values = []
        self._library.emulated_forget()
        for argument in arguments:
            if isinstance(argument, np.ndarray):
                if not argument.flags["C_CONTIGUOUS"] or argument.ctypes.data % 16:
                    raise ValueError("arrays must be contiguous, from a multiple of 16")
                self._library.emulated_memory(
                    ctypes.c_void_p(argument.ctypes.data), ctypes.c_size_t(argument.nbytes)
                )
                values.append(ctypes.c_void_p(argument.ctypes.data))
            else:
                values.append(ctypes.create_string_buffer(argument.tobytes()))
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(value) for value in values])
        run = getattr(self._library, f"emulated_{entry}")
        run((ctypes.c_uint * 3)(*grid), ctypes.c_uint(threads), ctypes.c_uint(shared), pointers)
        mistake = self._library.emulated_error()
        if mistake:
            raise EmulationError(mistake.decode())


@dataclass(frozen=True)
class Traffic:
    """Accesses of one kind, by all warps: ``parts`` are the passes over the banks of shared memory,
    or the sectors of 32 bytes of global memory, that they take, ``least`` the fewest for as much.
    """

    instructions: int
    bytes: int
    parts: int
    least: int


def run_kernel(
    kernel: Kernel,
    arrays: Sequence[np.ndarray],
    symbols: Mapping[str, int],
    directory: Path | None = None,
    seed: int = 0,
) -> None:
    """Run all launches of `kernel` on `arrays`, its operands in order; results are in place.

    Scratch starts as NaN. Libraries are kept in `directory`, by default one of this process's user.
    """
    _run_launches(_loaded(kernel, directory, seed), kernel, arrays, symbols)


def count_traffic(
    kernel: Kernel,
    arrays: Sequence[np.ndarray],
    symbols: Mapping[str, int],
    directory: Path | None = None,
) -> tuple[dict[str, Traffic], int]:
    """Run `kernel` as `run_kernel` does; what it moves, by WAYS, and how many multiplications its
    tensor cores do.
    """
    emulated = _loaded(kernel, directory, seed=0)
    with emulated.counting() as counts:
        _run_launches(emulated, kernel, arrays, symbols)
        numbers = counts()
    rows = zip(WAYS, np.reshape(numbers[:-1], (len(WAYS), 4)).tolist())
    return {way: Traffic(*row) for way, row in rows}, numbers[-1]


def _loaded(kernel: Kernel, directory: Path | None, seed: int) -> Emulated:
    folder = directory or kept()
    folder.mkdir(parents=True, exist_ok=True)
    return Emulated(build(kernel.source, folder), seed)


def _run_launches(
    emulated: Emulated,
    kernel: Kernel,
    arrays: Sequence[np.ndarray],
    symbols: Mapping[str, int],
) -> None:
    if len(arrays) != len(kernel.operands):
        raise ValueError(f"{len(arrays)} arrays for the operands {', '.join(kernel.operands)}")
    copies = [_apart(array) for array in arrays]
    named: dict[str, Argument] = dict(zip(kernel.operands, copies))
    for name, extent in kernel.scratch.items():
        named[name] = aligned(evaluate(extent, symbols), np.uint8)
        named[name].fill(0xFF)
    for name, value in symbols.items():
        named.setdefault(name, np.int32(value))
    for launch in kernel.launches:
        if evaluate(launch.when, symbols) <= 0:
            continue
        grid = [evaluate(extent, symbols) for extent in launch.grid]
        arguments = [named[name] for name in launch.arguments]
        emulated.launch(launch.entry, grid, launch.threads, launch.shared, arguments)
    for array, copy in zip(arrays, copies):
        array[...] = copy


def aligned(
    shape: int | tuple[int, ...], dtype: np.dtype | type, boundary: int = 256
) -> np.ndarray:
    """An empty array from a multiple of `boundary` bytes, as a GPU's allocations are.

    Nothing else lies near it, so what goes beyond its ends is found.
    """
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.empty(_APART + count + boundary + _APART, np.uint8)
    first = _APART + -memory.ctypes.data % boundary
    return memory[first : first + count].view(dtype).reshape(shape)


def _apart(array: np.ndarray) -> np.ndarray:
    copy = aligned(array.shape, array.dtype)
    copy[...] = array
    return copy
