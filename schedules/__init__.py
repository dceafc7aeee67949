"""Says how one kernel runs on one kind of machine: the schedules of a row's kind.

Kernels work on tokens in blocks of ``BLOCK_TOKENS``, which ``bertile.loader.token_blocks`` cuts a
batch into. A block is not a register: on a CPU its tokens are the lanes of one vector of TIR, which
fills one register of AVX-512, two of AVX2 and four of NEON (``Row.vector_bits``); on a GPU they are
rows, as many as one ``mma`` instruction of tensor cores takes.

May import: nothing else of Bertile; machines come as rows.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bertile.schedules.schedule import Row, Sample, Schedule
    from bertile.schedules.task import Task

BLOCK_TOKENS = 16


def schedules_for(row: Row) -> dict[str, Schedule]:
    """The schedules for this kind of machine, by the operation they run."""
    return _of("cuda" if row.arch == "cuda" else "cpu")


def trial_sample(task: Task, blocks: int, row: Row) -> Sample:
    """What a task is tried on, wherever that is: the same numbers every time, and the same weights
    for any number of blocks.
    """
    return _sample(task, blocks, "cuda" if row.arch == "cuda" else "cpu")


def _of(kind: str) -> dict[str, Schedule]:
    # by name: kernels for CPUs need TVM, those for GPUs do not
    return import_module(f"{__name__}.{kind}").SCHEDULES


@lru_cache(maxsize=32)  # a search goes from task to task and comes back
def _sample(task: Task, blocks: int, kind: str) -> Sample:
    import numpy as np

    return _of(kind)[task.operation].sample(task, blocks, np.random.default_rng(0))
