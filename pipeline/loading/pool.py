"""Calls a model where TVM's thread pool has the threads that the model may use."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

from bertile.loading.tvm_abi import Runtime

_thread = threading.local()  # of each thread: the pool it has, and the threads that stand in for it


def on_pool(runtime: Runtime, threads: int, call):
    """Run `call` where TVM's pool has `threads` threads: here, or else in a thread of our own.

    TVM has one pool for each calling thread. One that exists cannot grow, and after a fork its
    workers are gone; a new thread gets a new pool.
    """
    if getattr(_thread, "process", None) not in (None, os.getpid()):
        return _stand_in(threads).submit(on_pool, runtime, threads, call).result()
    if getattr(_thread, "threads", None) != threads:
        runtime.resize_pool(threads)
        _thread.process, _thread.threads = os.getpid(), threads
        _thread.enough = runtime.call(runtime.function("runtime.NumThreads")) >= threads
    if _thread.enough or getattr(_thread, "stands_in", False):
        return call()
    return _stand_in(threads).submit(on_pool, runtime, threads, call).result()


def _stand_in(threads: int) -> ThreadPoolExecutor:
    pools = _thread.__dict__.setdefault("pools", {})
    key = (os.getpid(), threads)
    if key not in pools:
        pools[key] = ThreadPoolExecutor(
            1, initializer=setattr, initargs=(_thread, "stands_in", True)
        )
    return pools[key]
