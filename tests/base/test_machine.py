"""Who takes the processor's time."""

from __future__ import annotations

import os
from pathlib import Path

from bertile.base import machine


def test_watch_tells_our_cpu_time_from_that_of_others(tmp_path: Path) -> None:
    (tmp_path / str(os.getpid())).mkdir()
    (tmp_path / "7").mkdir()

    def write(busy: int, steal: int, idle: int, ours: int) -> None:
        (tmp_path / "stat").write_text(f"cpu  {busy} 0 0 {idle} 0 0 0 {steal} 0 0\ncpu0 0\n")
        for pid in (os.getpid(), 7):
            text = f"{pid} (a name) ) R {'0 ' * 10}{ours} {ours} 0\n"
            (tmp_path / str(pid) / "stat").write_text(text)

    write(0, 0, 0, 0)
    watch = machine.Watch([7], tmp_path)
    write(busy=60, steal=20, idle=20, ours=10)  # 4 × 10 ticks are ours
    assert watch.busy()["others_percent"] == 40.0
    (tmp_path / "stat").unlink()
    assert watch.busy()["others_percent"] is None
    assert "not known" in machine.busy_sentence({"others_percent": None, "load": []})


def test_processor_has_a_name() -> None:
    assert machine.cpu_name() and "\n" not in machine.cpu_name()
