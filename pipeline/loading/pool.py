"""Calls a model where TVM's thread pool has the threads that the model may use."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

from bertile.loading.tvm_abi import Runtime

_here = threading.local()  # of each thread: the pool it has, and the threads that stand in for it


def on_pool(runtime: Runtime, threads: int, work):
    """Call `work` where TVM's pool has `threads` threads: here, or else in a thread of our own.

    TVM has one pool for each calling thread. One that exists cannot grow, and after a fork its
    workers are gone; a new thread gets a new pool.
    """
    if getattr(_here, "process", None) not in (None, os.getpid()):
        return _stand_in(threads).submit(on_pool, runtime, threads, work).result()
    if getattr(_here, "threads", None) != threads:
        runtime.resize_pool(threads)
        _here.process, _here.threads = os.getpid(), threads
        _here.enough = runtime.call(runtime.function("runtime.NumThreads")) >= threads
    if _here.enough or getattr(_here, "stands_in", False):
        return work()
    return _stand_in(threads).submit(on_pool, runtime, threads, work).result()


def _stand_in(threads: int) -> ThreadPoolExecutor:
    made = _here.__dict__.setdefault("made", {})
    key = (os.getpid(), threads)
    if key not in made:
        made[key] = ThreadPoolExecutor(1, initializer=setattr, initargs=(_here, "stands_in", True))
    return made[key]
