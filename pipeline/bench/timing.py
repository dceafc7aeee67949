"""Times the calls of a function. Imports nothing of Bertile, since an engine that lives in another
Python runs this file by its path.
"""

from __future__ import annotations

import time

# Before what is measured: the caches and threads that the engine before has taken are won back.
WARM_UP_CALLS = 3
WARM_UP_SECONDS = 0.05
WARM_UP_LIMIT = 50


def timed(infer, inputs, count: int) -> list[float]:
    """Milliseconds of `count` calls behind a warm-up of some calls and some time."""
    began = time.perf_counter()
    for done in range(WARM_UP_LIMIT):
        if done >= WARM_UP_CALLS and time.perf_counter() - began >= WARM_UP_SECONDS:
            break
        infer(inputs)
    times = []
    for _ in range(count):
        began = time.perf_counter()
        infer(inputs)
        times.append((time.perf_counter() - began) * 1e3)
    return times
