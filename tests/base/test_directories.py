"""A result takes its place whole; of an older one, what Bertile did not write is never touched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bertile.base import directories
from bertile.base.errors import BertileError, UsageError

MARKER = "made.json"


def make(output, files=("a.bin", "deep/b.bin"), text="new", marker=MARKER) -> None:
    with directories.making(output, marker) as directory:
        for name in files:
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_text(text)
        directories.mark(directory, marker, {})


def tree(directory: Path) -> dict[str, str | None]:
    """All that lies in a directory: the text of files, None of directories; links as they are."""
    return {
        path.relative_to(directory).as_posix(): path.readlink().as_posix()
        if path.is_symlink()
        else (None if path.is_dir() else path.read_text())
        for path in sorted(directory.rglob("*"))
        if path.name != MARKER
    }


NEW = {"a.bin": "new", "deep": None, "deep/b.bin": "new"}


@pytest.fixture
def older(tmp_path) -> Path:
    make(tmp_path / "out", ("a.bin", "gone.bin", "old/c.bin"), "old")
    return tmp_path / "out"


@pytest.fixture(params=["exchanged", "renamed", "in place"])
def way(request, monkeypatch, older) -> None:
    """How a directory is replaced: at once, without the system call, or where it must stay."""
    if request.param == "renamed":
        monkeypatch.setattr(directories, "_exchange", lambda first, second: False)
    if request.param == "in place":
        monkeypatch.chdir(older)


def test_an_older_result_is_replaced_by_its_names(older, way):
    make(older)
    assert tree(older) == NEW
    assert [path.name for path in older.parent.iterdir()] == ["out"]


def test_what_somebody_put_there_stays(older, way):
    (older / "notes.txt").write_text("mine")
    (older / "old" / "mine.txt").write_text("mine")
    (older / ".git" / "objects").mkdir(parents=True)
    (older / ".git" / "HEAD").write_text("mine")
    (older / "link").symlink_to("/nowhere")
    make(older)
    assert tree(older) == {
        **NEW,
        "notes.txt": "mine",
        "old": None,
        "old/mine.txt": "mine",
        ".git": None,
        ".git/objects": None,
        ".git/HEAD": "mine",
        "link": "/nowhere",
    }
    assert [path.name for path in older.parent.iterdir()] == ["out"]


def test_somebodys_file_in_the_way_is_named_and_left(older, way):
    (older / "deep").mkdir()
    (older / "deep" / "b.bin").write_text("mine")
    before = tree(older)
    with pytest.raises(UsageError, match=r"deep/b\.bin was not written by Bertile"):
        make(older)
    assert tree(older) == before
    assert [path.name for path in older.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "marker",
    ["{}", "[]", "no JSON", '{"schema": 1, "bertile": "0"}', '{"schema": "1", "files": []}'],
)
def test_a_marker_of_another_program_is_none(tmp_path, marker):
    out = tmp_path / "out"
    out.mkdir()
    (out / MARKER).write_text(marker)
    with pytest.raises(UsageError, match="was not made by Bertile"):
        make(out)
    assert (out / MARKER).read_text() == marker


def test_names_in_a_marker_that_lead_out_are_not_followed(tmp_path, way, older):
    (tmp_path / "mine.txt").write_text("mine")
    content = json.loads((older / MARKER).read_text())
    (older / "link").symlink_to("..")
    content["files"] += ["../mine.txt", str(tmp_path / "mine.txt"), "link/mine.txt", "link"]
    (older / MARKER).write_text(json.dumps(content))
    make(older)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_an_empty_directory_is_filled_and_stays_the_same(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    inode = Path.cwd().stat().st_ino
    make(".")
    assert tree(Path.cwd()) == NEW and Path.cwd().stat().st_ino == inode


def test_a_path_that_no_disk_takes_is_one_sentence(tmp_path):
    with pytest.raises(BertileError, match="File name too long; free some space or choose"):
        make(tmp_path / ("long" * 750))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_goes_the_next_time(tmp_path):
    script = f"""
import time
from bertile.base import directories
with directories.making({str(tmp_path / "out")!r}, "made.json") as directory:
    (directory / "half").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        make(tmp_path / "out")  # beside one that is alive
        assert len(list(tmp_path.iterdir())) == 2
        process.kill()
    make(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_directory_of_a_like_name_is_not_taken_for_a_leftover(tmp_path):
    for name in (".out.bertile-mine", ".out.bertile-notes-of-mine", ".out.mine"):
        (tmp_path / name).mkdir()
    make(tmp_path / "out")
    assert len(list(tmp_path.iterdir())) == 4


def test_what_is_put_into_the_older_result_meanwhile_is_left_and_named(older, monkeypatch):
    exchange = directories._exchange

    def late(first, second):
        (second / "late.txt").write_text("mine")
        return exchange(first, second)

    monkeypatch.setattr(directories, "_exchange", late)
    with pytest.raises(BertileError, match="meanwhile is in ") as caught:
        make(older)
    assert tree(older) == NEW
    left = Path(str(caught.value).rpartition(" is in ")[2])
    assert tree(left) == {"late.txt": "mine"}


def test_marks_list_what_lies_there(tmp_path):
    make(tmp_path / "out")
    content = json.loads((tmp_path / "out" / MARKER).read_text())
    assert content["files"] == ["a.bin", "deep/b.bin"] and content["schema"] == directories.SCHEMA
    assert os.stat(tmp_path / "out").st_mode & 0o777 == 0o777 & ~directories._umask()
