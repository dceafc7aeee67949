"""Runs a model in a thread of its own, whose pool has the threads that the model may use, or a
model of one thread in the thread that calls it.

TVM has one pool for each thread that calls it. A pool cannot grow, and a fork takes none of its
threads along: a process whose caller had a pool when it forked would wait for them at its end. So
the pool belongs to a thread that a fork leaves behind with it, and a child starts its own. One
thread needs no pool, and the way to another thread and back costs as much as a tiny model.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections import deque
from queue import SimpleQueue

from bertile.loading.errors import BertileError
from bertile.loading.tvm_abi import Runtime

# Held by whoever calls TVM outside of a model's call: to load, to close, to size a pool.
outside = threading.RLock()
_forks = threading.Lock()  # one at a time, since each waits for all calls to end
_hosts: weakref.WeakSet[Host | Caller] = weakref.WeakSet()
_waiting: list = []  # the locks that the fork under way holds
_generation = 0  # of this process: how many forks lie between it and the one that began
_ended = False  # no thread of a model runs any more


def host_of(runtime: Runtime, threads: int) -> Host | Caller:
    """Return what runs a model of so many threads."""
    return Caller(runtime) if threads == 1 and runtime.runs_alone else Host(runtime, threads)


class Caller:
    """Runs a model of one thread in whichever thread calls, one call after the other."""

    def __init__(self, runtime: Runtime):
        # held during a call: a fork waits for it. A signal's handler that calls while its thread
        # is in a call, or forks, has it already.
        self.lock = threading.RLock()
        self._runtime, self._closed = runtime, False
        self._calls: deque[None] = deque()  # a number that threads may change without a lock
        _hosts.add(self)

    def run(self, function):
        """Return what `function` returns."""
        self._calls.append(None)
        try:
            with self.lock:
                _check_open(self._closed)
                return self._runtime.alone(function)
        finally:
            self._calls.pop()

    def backlog(self) -> int:
        """How many calls are under way, or wait."""
        return len(self._calls)

    def close(self) -> None:
        """Let a later call raise BertileError."""
        self._closed = True

    def join(self) -> None:
        """Wait for the call that is under way."""
        with self.lock:
            pass


class Host:
    """The thread of a model; it starts with the first call, and again in a forked process."""

    def __init__(self, runtime: Runtime, threads: int):
        self.lock = threading.Lock()  # held during a call: a fork waits for it
        self._runtime, self._threads = runtime, threads
        self._asked: SimpleQueue[_Call | None] | None = None  # what the thread has to do
        self._thread: threading.Thread | None = None
        self._started_in, self._closed = _generation, False
        _hosts.add(self)

    def run(self, function):
        """Return what `function` returns in the model's thread, one call after the other.

        What it raises is raised. A caller whom Ctrl-C calls away leaves its call to the thread.
        """
        with outside:
            _check_open(self._closed)
            if self._asked is None or self._started_in != _generation:
                self._start()
            call = _Call(function)
            self._asked.put(call)
        return call.result()

    def backlog(self) -> int:
        """How many calls the thread is at, or has before it."""
        if self._asked is None or self._started_in != _generation:
            return 0
        return self._asked.qsize() + self.lock.locked()

    def close(self) -> None:
        """End the thread behind the call that it is at; a later call raises BertileError."""
        self._closed = True
        if self._asked is not None and self._started_in == _generation:
            self._asked.put(None)
        self._asked = None

    def join(self) -> None:
        """Wait until the thread has ended."""
        if self._thread is not None and self._started_in == _generation:
            self._thread.join()

    def __del__(self):
        self.close()

    def _start(self) -> None:
        asked: SimpleQueue[_Call | None] = SimpleQueue()
        # a daemon, since Python waits for all others before it tells anybody that it ends
        thread = threading.Thread(target=_serve, args=(asked, self.lock), name="bertile")
        thread.daemon = True
        try:
            thread.start()
        except RuntimeError as error:  # there are too many, or Python is ending
            raise BertileError(f"the model's thread cannot start: {error}") from error
        try:
            # waited for with `outside`, since this size is set for the whole process
            asked.put(call := _Call(lambda: self._runtime.resize_pool(self._threads)))
            call.result()
        except BaseException:
            asked.put(None)
            raise
        self._asked, self._thread, self._started_in = asked, thread, _generation


class _Call:
    """A function on its way to the thread of a model, and what came of it on its way back."""

    __slots__ = ("_done", "_error", "_function", "_result")

    def __init__(self, function):
        self._function, self._done = function, threading.Lock()
        self._result = self._error = None
        self._done.acquire()

    def run(self, lock: threading.Lock) -> None:
        try:
            with lock:
                self._result = self._function()
        except BaseException as error:  # all is the caller's, as in a thread of its own
            self._error = error
        self._done.release()

    def result(self):
        self._done.acquire()
        error, self._error = self._error, None
        if error is None:
            return self._result
        try:
            raise error
        finally:
            del error  # it holds this frame, and would so hold itself and the model


def _check_open(closed: bool) -> None:
    if closed:
        raise BertileError("the model is closed", "load the bundle again")
    # at the end of a process its own thread is alone with what atexit calls, in an order
    # that nobody knows; other threads are waited for before
    alone = not threading.main_thread().is_alive()
    if _ended or (alone and threading.current_thread() is threading.main_thread()):
        raise BertileError("the model is closed: this process is ending")


def _serve(asked: SimpleQueue[_Call | None], lock: threading.Lock) -> None:
    """Do what is asked for until that is nothing. It holds no host, so that a lost one can end."""
    while (call := asked.get()) is not None:
        call.run(lock)
        del call  # and with it the model


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


def _after_fork_in_child() -> None:
    global _generation
    _generation += 1  # a process number would not do: a child in a namespace may have the parent's
    _after_fork()


@atexit.register
def _end() -> None:
    """End all threads of models, so that none is within TVM when the process takes it apart."""
    global _ended
    with outside:
        _ended = True
        hosts = list(_hosts)
        for host in hosts:
            host.close()
    for host in hosts:
        host.join()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child
    )
