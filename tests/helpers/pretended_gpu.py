"""A GPU that is not there: the library in the place of the driver, and code that it takes."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from helpers.fake_driver import build_driver

from bertile.run.cuda import emulator
from bertile.schedules import schedules_for
from bertile.tune.measure.cuda import card


def driver() -> Path:
    """The library, in a directory where it has the driver's name; skips where there is no C++."""
    if reason := emulator.missing():
        pytest.skip(reason)
    folder = _folder()
    name = folder / "libcuda.so.1"
    library = build_driver(folder)
    if not name.exists() or name.resolve() != library.resolve():
        name.unlink(missing_ok=True)
        name.symlink_to(library)
    return name


def image(task, knobs, row, broken: bool = False) -> bytes:
    """What the compiler would give: PTX, whose entries the emulated kernel stands in for. A broken
    one reads what belongs to nobody.
    """
    kernel = schedules_for(row)[task.operation].kernel(task, dict(knobs), row)
    entries = "".join(f".visible .entry {name}() {{ ret; }}\n" for name in _entries(kernel))
    source = kernel.source
    if broken:
        name = kernel.launches[0].entry
        at = source.index("{", source.index(f"{name}(")) + 1
        source = f"{source[:at]} *(volatile int*)4096 = 1; {source[at:]}"
    library = emulator.build(source, _folder())
    return f".version 8.0\n.target sm_80\n{entries}// emulated: {library}\n".encode()


@functools.lru_cache(maxsize=1)
def open_card() -> card.Card:
    """The device in this process."""
    return card.Card(driver=str(driver()))


def _entries(kernel) -> list[str]:
    return list(dict.fromkeys(launch.entry for launch in kernel.launches))


def _folder() -> Path:
    folder = emulator.kept()
    folder.mkdir(parents=True, exist_ok=True)
    return folder
