"""A process that forks, whatever its threads are doing, leaves children that work and that end.

Models of one thread, which run where they are called, and of several, which have a thread.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import tiny_bundle

from bertile import loader
from bertile.bundle import writer
from bertile.loader import BertileError
from bertile.loading.pool import Caller, Host
from bertile.loading.tvm_abi import Runtime

THREADS = {"as many as cores": None, "the calling one": 1}
CALLED = """
import os, sys, threading
import numpy as np
from bertile import loader
model = loader.load({directory!r}, {threads})
ids = np.ones((8, 64), int)
wanted = model(input_ids=ids)["pooled"]
"""
# What a child does; it must end by itself, with the exit code that it gave.
CHILDREN = {
    "only exits": "sys.exit(7)",
    "closes the model": "model.close(); sys.exit(7)",
    "calls and exits": "assert (model(input_ids=ids)['pooled'] == wanted).all(); sys.exit(7)",
    "loads again": (
        "again = loader.load({directory!r})\n"
        "    assert (again(input_ids=ids)['pooled'] == wanted).all()\n    sys.exit(7)"
    ),
    "forks again": (
        "pid = os.fork()\n    model(input_ids=ids)\n"
        "    sys.exit(7 + os.waitpid(pid, 0)[1] if pid else 0)"
    ),
}
FORK = """
def start():
    pid = os.fork()
    if pid:
        return pid
    {child}
children = [start() for _ in range({count})]
print(*(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children))
"""
BUSY = """
stop = threading.Event()
def ask():
    while not stop.is_set():
        model(input_ids=ids)
threads = [threading.Thread(target=ask) for _ in range(2)]
for thread in threads: thread.start()
"""
FREE = "\nstop.set()\nfor thread in threads: thread.join()\n"


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    build = f"runpy.run_path({tiny_bundle.__file__!r})['build_library']"
    tiny_bundle.python(f"import runpy; {build}({str(folder / 'lib.so')!r})")
    bundle = (tiny_bundle.MANIFEST, folder / "lib.so", tiny_bundle.PARAMS, [], folder / "out")
    return writer.write(*bundle)


@pytest.fixture(params=THREADS.values(), ids=THREADS)
def called(request, directory) -> str:
    """A program that has loaded a model and called it."""
    return CALLED.format(directory=str(directory), threads=request.param)


@pytest.fixture
def threaded(monkeypatch) -> None:
    """Models of one thread have a thread of their own too."""
    monkeypatch.setattr(Runtime, "runs_alone", False)


def python(code: str) -> str:
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and not run.stderr, run.stderr
    return run.stdout


@pytest.mark.parametrize("child", CHILDREN)
def test_a_child_of_a_process_that_has_called_works_and_ends(called, directory, child):
    what = CHILDREN[child].format(directory=str(directory))
    code = called + FORK.format(child=what, count=2)
    assert python(code).split() == ["7", "7"]


def test_a_process_may_fork_while_other_threads_call(called):
    what = CHILDREN["calls and exits"]
    fork = FORK.format(child=what, count=20)
    code = called + BUSY + fork + FREE
    assert python(code).split() == ["7"] * 20


def test_a_child_with_the_number_of_its_parent_works(called):
    """As the first of a namespace of processes, whose parent is the first of another."""
    what = CHILDREN["calls and exits"]
    code = "import os\nos.getpid = lambda: 1\n" + called
    assert python(code + FORK.format(child=what, count=2)).split() == ["7", "7"]


def test_multiprocessing_forks_workers_that_call(called):
    code = """
import multiprocessing
def ask(number):
    return float(model(input_ids=ids)["pooled"].sum())
with multiprocessing.get_context("fork").Pool(2) as pool:
    print(len(set(pool.map(ask, range(6)))))
"""
    assert python(called + code) == "1\n"


def test_a_call_at_the_end_of_the_process_says_that_the_model_is_closed(called):
    code = """
import atexit
def late():
    try:
        model(input_ids=ids)
    except loader.BertileError as error:
        print(error)
atexit.register(late)
"""
    said = python(called + code)
    assert "the model is closed" in said and "this process is ending" in said


def test_a_closed_model_has_no_thread_left_and_says_so(called, directory):
    code = """
model.close()
for thread in threading.enumerate():
    if thread is not threading.main_thread(): thread.join(10)
print(threading.active_count())
"""
    assert python(called + code) == "1\n"
    with loader.load(directory) as model:
        pass
    with pytest.raises(BertileError, match="the model is closed"):
        model(input_ids=[[1]])


def test_threads_that_outlive_the_main_one_are_answered(called):
    code = """
def late():
    threading.main_thread().join()
    print((model(input_ids=ids)["pooled"] == wanted).all())
threading.Thread(target=late).start()
"""
    assert python(called + code) == "True\n"


def test_a_process_ends_behind_a_call_that_nobody_waits_for(called):
    code = """
import time
begun = threading.Event()
def slow():
    begun.set()
    time.sleep(0.5)
    print("done", flush=True)
threading.Thread(target=lambda: model._streams[0].host.run(slow), daemon=True).start()
begun.wait(60)
"""
    assert python(called + code) == "done\n"


def test_ctrl_c_calls_the_caller_away_and_the_model_works_on(directory):
    called = CALLED.format(directory=str(directory), threads=1)
    own = "from bertile.loading.tvm_abi import Runtime\nRuntime.runs_alone = False\n"
    code = """
import signal
def once(*_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt
signal.signal(signal.SIGINT, once)
begun, go, done, stopped = threading.Event(), threading.Event(), [], threading.Event()
def hold():
    begun.set()
    done.append(go.wait(60))
def interrupt():
    begun.wait(60)
    while not stopped.wait(0.1):  # Python misses a signal just before a thread begins to wait
        os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt).start()
try:
    model._streams[0].host.run(hold)
except KeyboardInterrupt:
    stopped.set()
    print("stopped", done)  # the call is still under way
go.set()
print((model(input_ids=ids)["pooled"] == wanted).all(), done)
"""
    said = python(own + called + code)
    assert said.splitlines() == ["stopped []", "True [True]"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(3)])
@pytest.mark.parametrize("threads", THREADS.values(), ids=THREADS)
def test_what_a_call_raises_is_the_callers(directory, error, threads):
    def fail():
        raise error

    with loader.load(directory, threads) as model:
        for _ in range(2):
            with pytest.raises(type(error)) as caught:
                model._streams[0].host.run(fail)
            assert caught.value is error and caught.traceback[-1].name == "fail"
        assert model._streams[0].host.run(lambda: 5) == 5


@pytest.mark.usefixtures("threaded")
def test_a_pool_that_cannot_be_sized_is_an_error_of_each_call(directory, monkeypatch):
    def fail(threads):
        raise BertileError("no pool")

    with loader.load(directory) as model:
        monkeypatch.setattr(model._runtime, "resize_pool", fail)
        for _ in range(2):
            with pytest.raises(BertileError, match="no pool"):
                model(input_ids=[[1]])
        monkeypatch.undo()
        assert isinstance(model._streams[0].host, Host)
        assert model(input_ids=[[1]])["pooled"].shape == (1, 8)


@pytest.mark.usefixtures("threaded")
def test_a_model_that_is_lost_ends_its_thread(directory):
    model = loader.load(directory, 1)
    with pytest.raises(ZeroDivisionError):
        model._streams[0].host.run(lambda: 1 / 0)
    model(input_ids=[[1]])
    thread, lost = model._streams[0].host._thread, weakref.ref(model)
    del model
    assert lost() is None
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("threads", THREADS.values(), ids=THREADS)
def test_many_callers_of_one_model_each_get_their_own(directory, threads):
    with loader.load(directory, threads) as model, ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda n: model._streams[0].host.run(lambda: n), range(500))) == [
            *range(500)
        ]


def test_a_call_beside_a_close_is_answered_or_refused(directory):
    """None is left waiting for a thread that has ended."""
    for _ in range(20):
        model = loader.load(directory, 1)
        model(input_ids=[[1]])

        def ask(number, model=model):
            try:
                return model(input_ids=[[number]])["pooled"].shape
            except BertileError as error:
                assert "the model is closed" in str(error)

        with ThreadPoolExecutor(4) as pool:
            answers = pool.map(ask, range(12), timeout=60)
            model.close()
            assert set(answers) <= {(1, 8), None}


# -- a model of one thread, in the thread that calls


def test_a_model_of_one_thread_starts_none_and_leaves_tvm_as_it_was(directory):
    with loader.load(directory, 1) as model:
        runtime, host = model._runtime, model._streams[0].host
        before = threading.active_count(), runtime._threads()
        assert host.run(lambda: (threading.get_ident(), runtime._threads())) == (
            threading.get_ident(),
            1,
        )
        model(input_ids=[[1]])
        assert isinstance(host, Caller) and before[1] > 0
        assert (threading.active_count(), runtime._threads()) == before


def test_a_call_in_the_midst_of_another_changes_nothing_of_it(directory, monkeypatch):
    """As that of a signal's handler, which finds the inputs of the other written."""
    with loader.load(directory, 1) as model:
        call, inner = model._runtime.call_packed, []

        def interrupted(*arguments):
            if not inner:
                inner.append(None)
                inner.append(model(input_ids=[[3, 4]]))
            return call(*arguments)

        model(input_ids=[[5, 6]])
        monkeypatch.setattr(model._runtime, "call_packed", interrupted)
        outer = model(input_ids=[[1, 2]])
        tiny_bundle.assert_same(outer, tiny_bundle.expected([[1, 2]]))
        tiny_bundle.assert_same(inner[1], tiny_bundle.expected([[3, 4]]))


def test_a_close_in_the_midst_of_a_call_lets_it_end(directory, monkeypatch):
    model = loader.load(directory, 1)
    call = model._runtime.call_packed

    def interrupted(*arguments):
        model.close()
        return call(*arguments)

    model(input_ids=[[5, 6]])
    monkeypatch.setattr(model._runtime, "call_packed", interrupted)
    tiny_bundle.assert_same(model(input_ids=[[1, 2]]), tiny_bundle.expected([[1, 2]]))
    assert model.closed and not model._streams[0]._buffers
    with pytest.raises(BertileError, match="the model is closed"):
        model(input_ids=[[1, 2]])


def test_a_fork_in_the_midst_of_a_call_leaves_a_child_that_calls(directory):
    code = """
def fork():
    pid = os.fork()
    if not pid:
        assert (model(input_ids=ids)["pooled"] == wanted).all()
        os._exit(7)
    return pid
pid = model._streams[0].host.run(fork)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    assert python(CALLED.format(directory=str(directory), threads=1) + code) == "7\n"


def test_waiting_calls_are_counted(directory):
    inside, go = threading.Event(), threading.Event()

    def hold():
        inside.set()
        return go.wait(30)

    with loader.load(directory, 1) as model, ThreadPoolExecutor(2) as pool:
        stream = model._streams[0]
        calls = [pool.submit(stream.host.run, hold)]
        assert inside.wait(30) and stream.backlog() == 1
        calls.append(pool.submit(model, input_ids=[[1]]))
        while stream.backlog() < 2:
            assert not calls[1].done()
        go.set()
        assert calls[0].result(30) and calls[1].result(30)["pooled"].shape == (1, 8)
        assert stream.backlog() == 0
