"""Counts the cores that this process may use, and sets how TVM's threads behave on them."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np

from bertile.loading.errors import InputError

MOST_STREAMS = 256


def set_thread_defaults() -> None:
    """Set, before TVM's thread pool starts, what the user has not: no pinning, a short spin.

    TVM pins its workers, and the calling thread, to the first cores of the machine; two processes
    would share those and leave the others idle. It spins 300,000 rounds after each kernel, which
    on a shared machine takes the core from whoever has work.
    """
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "2000")


def available_cores() -> int:
    """Return how many cores this process may use: its affinity, and the quota of its cgroup."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:
        cores = os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(cores, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup, or "max": no quota
        return cores


def thread_count(threads: int | None) -> int:
    """Return `threads` if this process may use so many cores, else raise InputError.

    None is every core it may use, or as many as TVM_NUM_THREADS says.
    """
    available, wish = available_cores(), os.environ.get("TVM_NUM_THREADS")
    if threads is None:
        if wish is not None and not wish.isdecimal():
            raise InputError(f"TVM_NUM_THREADS is '{wish}'", "set it to a number, or not at all")
        return max(1, min(available, int(wish or available)))
    if isinstance(threads, bool) or not isinstance(threads, (int, np.integer)) or threads < 1:
        raise InputError(f"threads is {threads!r}", "give a whole number from 1")
    if threads > available:
        raise InputError(f"threads is {threads}, but this process may use {available} cores")
    return int(threads)


def stream_count(streams: int | None) -> int:
    """Return `streams`, 1 for None; raises InputError for what is no number from 1 to 256."""
    if streams is None:
        return 1
    whole = isinstance(streams, (int, np.integer)) and not isinstance(streams, bool)
    if not whole or not 1 <= streams <= MOST_STREAMS:
        raise InputError(f"streams is {streams!r}", f"give a whole number from 1 to {MOST_STREAMS}")
    return int(streams)
