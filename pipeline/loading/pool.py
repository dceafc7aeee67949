"""Runs a model in a thread of its own, whose pool has the threads that the model may use.

TVM has one pool for each thread that calls it. A pool cannot grow, and a fork takes none of its
threads along: a process whose caller had a pool when it forked would wait for them at its end. So
the pool belongs to a thread that a fork leaves behind with it, and a child starts its own.
"""

from __future__ import annotations

import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

from bertile.loading.errors import BertileError
from bertile.loading.tvm_abi import Runtime

# Held by whoever calls TVM outside of a model's call: to load, to close, to size a pool.
outside = threading.RLock()
_forks = threading.Lock()  # one at a time, since each waits for all calls to end
_hosts: weakref.WeakSet[Host] = weakref.WeakSet()
_waiting: list[threading.Lock] = []  # what the fork under way holds


class Host:
    """The thread of a model; it starts with the first call, and again in a forked process."""

    def __init__(self, runtime: Runtime, threads: int):
        self.lock = threading.Lock()  # held during a call: a fork waits for it
        self._runtime, self._threads = runtime, threads
        self._executor, self._process, self._closed = None, 0, False
        _hosts.add(self)

    def run(self, call):
        """Return what `call` returns in the model's thread, one call after the other."""
        with outside:
            if self._closed:
                raise BertileError("the model is closed", "load the bundle again")
            if self._process != os.getpid():
                self._executor = ThreadPoolExecutor(1, "bertile", self._size_pool)
                self._process = os.getpid()
        try:
            future = self._executor.submit(self._locked, call)
        except RuntimeError as error:  # of an executor that takes no more
            raise BertileError("the model is closed: this process is ending") from error
        return future.result()

    def close(self) -> None:
        """End the thread; a later call raises BertileError."""
        self._closed = True
        if self._executor is not None:
            self._executor.shutdown(wait=False)

    def _locked(self, call):
        with self.lock:
            return call()

    def _size_pool(self) -> None:
        with outside:  # the size of a new pool is set for the whole process
            self._runtime.resize_pool(self._threads)


def _before_fork() -> None:
    """Wait until nobody is within TVM, whose locks a child would find locked for ever."""
    _forks.acquire()
    outside.acquire()
    _waiting.extend(host.lock for host in list(_hosts))
    for lock in _waiting:
        lock.acquire()


def _after_fork() -> None:
    for lock in _waiting:
        lock.release()
    _waiting.clear()
    outside.release()
    _forks.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork
    )
