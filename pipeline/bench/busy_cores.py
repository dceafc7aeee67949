"""Keeps cores of this machine busy with processes of their own, as other programs would."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence

from bertile.loader import available_cores

# It ends by itself where nobody ends it: when the process that started it is gone.
SPIN = """
import os, sys
parent, core = int(sys.argv[1]), int(sys.argv[2])
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {core})
print("spins", flush=True)
while os.getppid() == parent:
    for _ in range(1000000):
        pass
"""


def cores() -> list[int]:
    """The numbers of cores that this process may use: as many as its quota allows."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))[: available_cores()]
    return list(range(available_cores()))


@contextlib.contextmanager
def busy(numbers: Sequence[int]) -> Iterator[list[int]]:
    """A process on each of these cores does nothing else but count; gives their process ids.

    Each is bound to its core where the system can do that. At the end, however it comes, all end.
    """
    with contextlib.ExitStack() as stack:
        pids = []
        for number in numbers:
            process = subprocess.Popen(
                [sys.executable, "-IS", "-c", SPIN, str(os.getpid()), str(number)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                # a Ctrl-C is ours to answer: without a stack of theirs on the terminal
                start_new_session=True,
            )
            stack.callback(_end, process)
            process.stdout.readline()  # it spins
            pids.append(process.pid)
        yield pids


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()
