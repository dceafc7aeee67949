"""Who takes the processor's time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

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


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("AMD EPYC, cpu family 25, model 17", ("AMD", 25, 17)),
        ("AMD EPYC 9R14 96-Core Processor, cpu family 25, model 17", ("AMD", 25, 17)),
        ("Intel(R) Xeon(R) Processor @ 2.0GHz, cpu family 6, model 143", ("Intel", 6, 143)),
        ("CPU implementer 0x41, CPU part 0xd0c", ("", 0x41, 0xD0C)),
        ("cortex-a76 by llvm-mca", ("cortex-a76 by llvm-mca", 0, 0)),
    ],
)
def test_processor_is_known_by_its_numbers(name: str, numbers: tuple[str, int, int]) -> None:
    assert machine.identity({"cpu": name}) == numbers


def test_processors_are_the_same_where_nothing_tells_them_apart() -> None:
    name = {"cpu": "AMD EPYC, cpu family 25, model 17"}
    caches = {**name, "caches": "L1 32K, L2 1024K"}
    assert machine.same_processor(name, caches) and machine.same_processor(caches, caches)
    assert not machine.same_processor(caches, {**name, "caches": "L1 32K, L2 512K"})
    assert not machine.same_processor(name, {"cpu": "AMD EPYC, cpu family 25, model 1"})
    assert not machine.same_processor({"gpu": "NVIDIA L4"}, {"gpu": "NVIDIA H200"})
    here = machine.processor()
    assert here["cpu"] == machine.cpu_name() and machine.same_processor(here, here)
