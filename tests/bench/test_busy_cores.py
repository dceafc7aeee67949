"""Busy cores: they are busy, bound where they should be, and gone at the end, whatever it is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from bertile.bench import busy_cores


def is_gone(pid: int) -> bool:
    """Whether nothing runs there within some seconds; a zombie runs nothing."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def test_processes_count_on_their_cores_and_end() -> None:
    numbers = busy_cores.cores()[:2]
    with busy_cores.busy(numbers) as pids:
        assert [os.sched_getaffinity(pid) for pid in pids] == [{number} for number in numbers]
        assert not is_gone_now(pids[0])
    assert all(map(is_gone, pids))


def test_quota_limits_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy_cores, "available_cores", lambda: 1)
    assert busy_cores.cores() == [min(os.sched_getaffinity(0))]


def test_nothing_is_busy_without_cores() -> None:
    with busy_cores.busy([]) as pids:
        assert pids == []


def test_processes_end_with_an_error() -> None:
    with pytest.raises(KeyboardInterrupt), busy_cores.busy(busy_cores.cores()[:1]) as pids:
        raise KeyboardInterrupt
    assert is_gone(pids[0])


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_processes_end_with_the_process_that_started_them(ending: signal.Signals) -> None:
    script = """
        import signal, time
        from bertile.bench import busy_cores
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has none
        with busy_cores.busy(busy_cores.cores()[:1]) as pids:
            print(pids[0], flush=True)
            time.sleep(60)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        pid = int(process.stdout.readline())
        process.send_signal(ending)
        assert process.wait(20) != 0 and is_gone(pid)
    finally:
        process.kill()
        process.communicate()


def is_gone_now(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()
