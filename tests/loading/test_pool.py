"""A process that forks, whatever its threads are doing, leaves children that work and that end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import tiny_bundle

from bertile import loader
from bertile.bundle import writer
from bertile.loader import BertileError

CALLED = """
import os, sys, threading
import numpy as np
from bertile import loader
model = loader.load({directory!r})
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


def python(code: str) -> str:
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and not run.stderr, run.stderr
    return run.stdout


@pytest.mark.parametrize("child", CHILDREN)
def test_a_child_of_a_process_that_has_called_works_and_ends(directory, child):
    what = CHILDREN[child].format(directory=str(directory))
    code = CALLED.format(directory=str(directory)) + FORK.format(child=what, count=2)
    assert python(code).split() == ["7", "7"]


def test_a_process_may_fork_while_other_threads_call(directory):
    what = CHILDREN["calls and exits"]
    fork = FORK.format(child=what, count=20)
    code = CALLED.format(directory=str(directory)) + BUSY + fork + FREE
    assert python(code).split() == ["7"] * 20


def test_multiprocessing_forks_workers_that_call(directory):
    code = """
import multiprocessing
def ask(number):
    return float(model(input_ids=ids)["pooled"].sum())
with multiprocessing.get_context("fork").Pool(2) as pool:
    print(len(set(pool.map(ask, range(6)))))
"""
    assert python(CALLED.format(directory=str(directory)) + code) == "1\n"


def test_a_call_at_the_end_of_the_process_says_that_the_model_is_closed(directory):
    code = """
import atexit
def late():
    try:
        model(input_ids=ids)
    except loader.BertileError as error:
        print(error)
atexit.register(late)
"""
    said = python(CALLED.format(directory=str(directory)) + code)
    assert "the model is closed" in said and "this process is ending" in said


def test_a_closed_model_has_no_thread_left_and_says_so(directory):
    code = """
model.close()
for thread in threading.enumerate():
    if thread is not threading.main_thread(): thread.join(10)
print(threading.active_count())
"""
    assert python(CALLED.format(directory=str(directory)) + code) == "1\n"
    with loader.load(directory) as model:
        pass
    with pytest.raises(BertileError, match="the model is closed"):
        model(input_ids=[[1]])
