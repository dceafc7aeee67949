"""Threads take jobs from a queue: each job once, and more of them where a thread is faster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import tirx
from tvm.tirx.script import builder as T

from bertile.codegen import job_queue, llvm
from bertile.schedules.cpu import lanes
from bertile.targets.rows import native
from bertile.tune.measure.roofline import use_threads

SLEEP = 100_000  # microseconds


def kernel(write, loops: int = 1):
    """Stores what ``write`` says at each job's place of an int64 tensor, in so many loops."""
    with lanes.kernel("jobs") as builder:
        out = builder.tensor("out", builder.blocks, dtype="int64")
        for _ in range(loops):
            with T.parallel(builder.blocks) as job:
                write(out, job)
    return builder.func


def called(func, jobs: int) -> np.ndarray:
    out = tvm.runtime.tensor(np.zeros(jobs, "int64"))
    llvm.build_kernel(func, native())(out)
    return out.numpy()


@pytest.mark.parametrize("jobs", [1, 2, 3, 8, 255, 256, 257, 5000])
@pytest.mark.parametrize("loops", [1, 3])
def test_each_job_is_done_once(jobs: int, loops: int) -> None:
    def write(out, job):
        T.buffer_store(out, out[job] + tirx.Cast("int64", job) + 1, [job])

    assert np.array_equal(called(kernel(write, loops), jobs), loops * (np.arange(jobs) + 1))


def threads_of_jobs() -> list[int]:
    """Which thread of two has done each of 64 jobs, of which the first takes its time."""

    def write(out, job):
        with T.If(job == 0), T.Then():
            T.evaluate(tirx.call_extern("int32", "usleep", SLEEP))
        T.buffer_store(out, tirx.call_extern("int64", "pthread_self"), [job])

    use_threads(2)
    return called(kernel(write), 64).tolist()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core runs one thread")
def test_thread_that_is_late_leaves_its_jobs_to_others() -> None:
    """In equal shares the jobs behind the first would wait for it. In a new process: TVM binds the
    threads of this one to cores.
    """
    code = "import test_job_queue; print(test_job_queue.threads_of_jobs())"
    said = subprocess.check_output([sys.executable, "-c", code], cwd=Path(__file__).parent)
    first, *others = json.loads(said)
    assert first not in others


def test_what_has_no_parallel_loop_stays_as_it_is() -> None:
    with lanes.kernel("serial") as builder:
        out = builder.tensor("out", builder.blocks, dtype="int64")
        with T.serial(builder.blocks) as i:
            T.buffer_store(out, tirx.const(1, "int64"), [i])
    assert job_queue.with_queue(builder.func).same_as(builder.func)
