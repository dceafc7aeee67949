"""Temporary directories end with their process, also where that is killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bertile.base import scratch
from bertile.base.cache import Cache
from bertile.base.directories import making
from bertile.base.errors import BertileError


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch) -> Path:
    """The system's temporary directory of this test."""
    place = tmp_path / "tmp"
    place.mkdir()
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return place


def begun(code: str, after: str = "") -> subprocess.Popen:
    """A process that waits at the end of the last block of `code`."""
    code = f"{code}\n    print('ready', flush=True); input()\n{after}"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


def kill(process: subprocess.Popen) -> None:
    process.kill()
    assert process.wait(timeout=30) == -signal.SIGKILL
    process.stdin.close()
    process.stdout.close()


def names(place: Path) -> list[str]:
    return sorted(path.relative_to(place).as_posix() for path in place.rglob("*"))


HOLD = "from bertile.base import scratch\nwith scratch.directory('a-') as place:\n"
FILL = "    (place / 'deep').mkdir(); (place / 'deep' / 'file').write_text('x')"


def test_a_directory_is_empty_private_and_gone_at_the_end(temporary):
    with scratch.directory("a-") as first, scratch.directory() as second:
        assert first != second and first.is_relative_to(temporary) and names(first) == []
        assert first.stat().st_mode & 0o077 == first.parent.stat().st_mode & 0o077 == 0
        (first / "file").write_text("x")
    assert names(temporary) == []
    with pytest.raises(ZeroDivisionError), scratch.directory():
        raise ZeroDivisionError
    assert names(temporary) == []


def test_what_a_killed_process_leaves_goes_with_the_next(temporary):
    kill(begun(HOLD + FILL))
    assert [Path(name).name for name in names(temporary)][-1] == "file"
    with scratch.directory() as place:
        assert names(temporary) == [place.parent.name, place.relative_to(temporary).as_posix()]
    assert names(temporary) == []


def test_what_a_living_process_has_stays(temporary):
    process = begun(HOLD + FILL)
    before = names(temporary)
    with scratch.directory():
        assert set(before) < set(names(temporary))
    assert names(temporary) == before
    process.communicate("\n", timeout=30)
    assert process.returncode == 0 and names(temporary) == []


def test_a_child_that_lives_on_keeps_the_directory_of_its_parent(temporary):
    """A worker that a fork has made may still write there."""
    process = begun(
        "import os, time\n" + HOLD + "    child = os.fork()\n    if not child:\n"
        "        os.close(1); time.sleep(60); os._exit(0)\n"
        "    (place / 'child').write_text(str(child))"
    )
    kill(process)
    (file,) = temporary.rglob("child")
    with scratch.directory():
        assert file.exists()
    os.kill(int(file.read_text()), signal.SIGKILL)
    while True:
        with scratch.directory():
            if not file.exists():
                return


def test_what_is_not_ours_stays(temporary):
    with scratch.directory() as place:
        home = place.parent
        for name in ("notes", "a-12345678"):
            (home / name).write_text("mine")
        (home / "short").mkdir()
        (home / "link-12345678").symlink_to(temporary)
        with scratch.directory():
            pass
    assert [path.name for path in sorted(home.iterdir())] == [
        "a-12345678",
        "link-12345678",
        "notes",
        "short",
    ]


@pytest.mark.parametrize("kind", ["file", "link", "open to all", "of another user"])
def test_a_home_of_somebody_else_is_refused(temporary, monkeypatch, kind):
    home = temporary / f"bertile-scratch-{os.getuid()}"
    if kind == "file":
        home.write_text("")
    elif kind == "link":
        home.symlink_to(temporary)
    else:
        home.mkdir()
        home.chmod(0o777 if kind == "open to all" else 0o700)
    if kind == "of another user":
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        home.rename(temporary / "bertile-scratch-12345")
    with pytest.raises(BertileError, match="is not a directory of your own; remove it, or set TM"):
        with scratch.directory():
            pass


def test_many_at_once_take_nothing_from_each_other(temporary):
    def use(number: int) -> bool:
        for _ in range(8):
            with scratch.directory() as place:
                (place / "file").write_text(str(number))
                if (place / "file").read_text() != str(number):
                    return False
        return True

    code = HOLD + "    pass\n" + "for _ in range(150):\n    with scratch.directory() as place: "
    code += "(place / 'x').write_text('x')\nif True:"
    process = begun(code + "\n    pass")
    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(use, range(24)))
    process.communicate("\n", timeout=60)
    assert process.returncode == 0 and names(temporary) == []


def test_without_locks_only_what_is_old_goes(temporary, monkeypatch):
    def unsupported(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(scratch.fcntl, "flock", unsupported)
    with scratch.directory() as place:
        old, new = place.parent / "a-aaaaaaaa", place.parent / "a-bbbbbbbb"
        old.mkdir()
        new.mkdir()
        os.utime(old, (0, 0))
        with scratch.directory():
            pass
        assert not old.exists() and new.exists() and place.exists()


MAKE = (
    "from bertile.base.cache import Cache\ndef make(place):\n    (place / 'half').write_text('x')"
)


def test_the_cache_loses_what_a_killed_process_was_making(tmp_path):
    """Whatever is asked for next, also what is there already."""
    cache = Cache(tmp_path / "cache")
    cache.get_or_make("there", lambda place: (place / "whole").write_text("x"))
    call = f"Cache({str(cache.directory)!r}).get_or_make('key', make)"
    for again in ("there", "key"):
        kill(begun(MAKE, call))
        assert [name for name in names(cache.directory) if name.endswith("/half")]
        cache.get_or_make(again, lambda place: (place / "whole").write_text("x"))
        assert not [name for name in names(cache.directory) if name.startswith(".")]


def test_the_cache_keeps_what_a_living_process_makes(tmp_path):
    """However long that takes, and however full the cache is."""
    cache = Cache(tmp_path / "cache", limit_bytes=0)
    process = begun(MAKE, f"Cache({str(cache.directory)!r}).get_or_make('key', make)")
    (entry,) = (path for path in cache.directory.iterdir() if path.name != "locks")
    os.utime(entry, (0, 0))
    cache.get_or_make("other", lambda place: None)
    cache.prune()
    assert (entry / "content/half").exists()
    process.communicate("\n", timeout=30)
    assert process.returncode == 0
    assert (cache.directory / "key/content/half").exists()


def test_an_output_loses_what_a_killed_process_was_writing(tmp_path, temporary):
    out = tmp_path / "out"
    code = (
        f"from bertile.base.directories import making\nwith making({str(out)!r}, 'm') as place:\n"
    )
    kill(begun(code + FILL))
    assert len(names(tmp_path)) == 4
    with making(out, "m") as directory:
        (directory / "new").write_text("x")
    assert names(tmp_path) == ["out", "out/new", "tmp"]


def leftovers(place: Path) -> list[str]:
    """What is there under a name of ours that does not last."""
    paths = [path for path in place.iterdir() if path.is_dir()]
    return [path.name for path in paths if path.name.startswith((".", "bertile-scratch-"))]


@pytest.mark.slow
def test_a_compile_that_is_killed_leaves_nothing_behind_the_next(tmp_path, temporary, exported):
    """With all that it has started, while it exports, builds, links and checks."""
    cache, entry = tmp_path / "cache", exported.directory.parent
    command = [sys.executable, "-m", "bertile", "-q", "compile", "synthetic:bert-tiny"]
    command += ["-o", str(tmp_path / "out"), "--cache-dir", str(cache), "--precision", "int8"]
    stages = (
        lambda: any(cache.glob(".export.*/content")),
        lambda: any(cache.glob(".driver-*/content")),
        lambda: any(temporary.glob("bertile-scratch-*/link-*/lib0.o")),
        lambda: any(cache.glob(".driver-*/content/.bundle.bertile-*/manifest.json")),
    )
    for number, reached in enumerate(stages):
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        while not reached() and process.poll() is None:
            time.sleep(0.001)
        assert process.poll() is None, f"it ended before stage {number}"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)
        assert leftovers(cache) or leftovers(temporary)
        if not number:
            shutil.copytree(entry, cache / entry.name)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert leftovers(cache) == leftovers(temporary) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out", "tmp"]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a /proc")
def test_place_where_nothing_can_be_made_is_an_error_at_once():
    with pytest.raises(OSError), scratch.held(Path("/proc"), "x-"):
        pass
