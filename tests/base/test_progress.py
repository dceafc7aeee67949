"""Progress: plain lines without a terminal, bars with one, silence with -q, and a log for all."""

from __future__ import annotations

import io
import logging
import re
import subprocess
import sys

import pytest

from bertile.base import progress as progress_module
from bertile.base import screen
from bertile.base.progress import Progress, default_progress, open_bar, track


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(stream: io.StringIO) -> str:
    """What a terminal was told, without how it moves its cursor and what colour a word has."""
    return re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", stream.getvalue())


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def test_lines_are_plain_when_there_is_no_terminal() -> None:
    stream = io.StringIO()
    progress = Progress(stream=stream)
    with progress.stage("export") as stage:
        stage.detail = "12 layers"
    with progress.stage("import") as stage:
        stage.cached = True
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("export    0.0 s") and lines[0].endswith("12 layers")
    assert lines[1] == "import    cached"
    assert "\x1b" not in stream.getvalue() and "\r" not in stream.getvalue()
    assert [(record["stage"], record["cached"]) for record in progress.summary()] == [
        ("export", False),
        ("import", True),
    ]


def test_status_lines_are_seldom_when_there_is_no_terminal() -> None:
    stream = io.StringIO()
    progress = Progress(stream=stream)
    for trial in range(1000):
        progress.status(f"trial {trial}")
    assert stream.getvalue() == "trial 0\n"


def test_loops_say_seldom_how_far_they_are_when_there_is_no_terminal(monkeypatch) -> None:
    monkeypatch.setattr(progress_module, "STATUS_SECONDS", 0.0)
    stream = io.StringIO()
    with Progress(stream=stream).stage("quantize"):
        assert list(track("abc", "calibrate")) == ["a", "b", "c"]
    lines = stream.getvalue().splitlines()
    assert lines[0] == "calibrate 1 of 3, about 0 s left" and lines[2] == "calibrate 3 of 3"
    stream.truncate(0)
    monkeypatch.setattr(progress_module, "STATUS_SECONDS", 10.0)
    with Progress(stream=stream).stage("quantize"):
        assert len(list(track(range(1000), "calibrate"))) == 1000
    assert "calibrate" not in stream.getvalue()


def test_loops_outside_of_a_stage_show_nothing(capsys) -> None:
    assert list(track([1, 2], "rows")) == [1, 2]
    with open_bar("bytes", 3) as bar:
        bar.advance(2)
    assert bar.count.startswith("2 of 3, about ")
    assert capsys.readouterr() == ("", "")


def test_short_loops_of_no_stage_say_nothing_when_there_is_no_terminal(monkeypatch) -> None:
    stream = io.StringIO()
    with Progress(stream=stream).bar("texts") as bar:
        bar.advance()
        assert stream.getvalue() == ""
        monkeypatch.setattr(progress_module, "STATUS_SECONDS", 0)
        bar.advance()
    assert stream.getvalue().split() == ["texts", "2"]


def test_time_that_is_left_is_said_in_minutes_where_it_is_long(monkeypatch) -> None:
    clock = iter([0.0, 100.0])
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    bar = progress_module.Bar(Progress(verbosity=-1, stream=io.StringIO()), "rows", 4)
    bar.done = 2
    assert bar.count == "2 of 4, about 1 min 40 s left"


def test_terminal_has_bars_and_is_clean_behind_them(terminal: Terminal) -> None:
    progress = Progress(stream=terminal)
    with progress.stage("quantize") as stage:
        for _ in track(range(4), "calibrate"):
            progress.say("said")
        stage.detail = "done"
    text = shown(terminal)
    assert "calibrate" in text and "4 of 4" in text
    assert text.count("said\n") == 4 and re.search(r"quantize  \d\.\d s  done\n$", text)
    assert terminal.getvalue().rstrip().endswith("done")
    assert "\x1b[?25l" in terminal.getvalue() and "\x1b[?25h" in terminal.getvalue()  # the cursor


def test_status_is_taken_off_a_terminal(terminal: Terminal) -> None:
    progress = Progress(stream=terminal)
    progress.status("trial 1")
    progress.status("trial 2")
    progress.close()
    progress.say("done")
    assert "trial 2" in shown(terminal) and terminal.getvalue().endswith("done\n")


def test_colour_is_left_out_where_no_color_is_set(terminal: Terminal, monkeypatch) -> None:
    def colours() -> list[str]:
        terminal.truncate(0)
        screen.show("exactly 42 'things'", terminal)
        assert "exactly 42 'things'" in shown(terminal)
        return re.findall(r"\x1b\[[\d;]*3\dm", terminal.getvalue())

    assert colours()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not colours()


def test_result_is_not_wrapped_or_coloured_in_a_pipe() -> None:
    stream = io.StringIO()
    screen.show(f"[bold]{'x' * 500}[/bold] 42", stream)
    assert stream.getvalue() == f"[bold]{'x' * 500}[/bold] 42\n"


def test_wide_results_are_whole_on_a_terminal(terminal: Terminal) -> None:
    screen.show(f"[a] :smile: {'x' * 500}", terminal)
    assert shown(terminal) == f"[a] :smile: {'x' * 500}\n"


def test_terminal_without_rich_has_plain_lines(terminal: Terminal, monkeypatch) -> None:
    monkeypatch.setattr(screen, "find_spec", lambda name: None)
    with Progress(stream=terminal).stage("export"):
        pass
    assert terminal.getvalue() == "export    0.0 s\n"


@pytest.mark.parametrize(("verbosity", "expected"), [(-1, ""), (0, "said\n"), (1, "said\nmore\n")])
def test_verbosity_decides_what_is_said(verbosity: int, expected: str) -> None:
    stream = io.StringIO()
    progress = Progress(verbosity, stream)
    progress.say("said")
    progress.detail("more")
    assert stream.getvalue() == expected


def test_what_is_said_is_logged_too_and_shown_to_nobody_who_did_not_ask(caplog, capsys) -> None:
    caplog.set_level(logging.DEBUG, "bertile")
    progress = default_progress()
    progress.say("said")
    progress.detail("more")
    with progress.stage("export") as stage:
        stage.detail = "bert"
    assert [(r.name, r.levelname, r.message) for r in caplog.records] == [
        ("bertile", "INFO", "said"),
        ("bertile", "DEBUG", "more"),
        ("bertile", "INFO", "export    0.0 s  bert"),
    ]
    assert capsys.readouterr() == ("", "")


def test_failing_stage_is_no_finished_stage_and_leaves_a_clean_line(terminal: Terminal) -> None:
    progress = Progress(stream=terminal)
    with pytest.raises(ValueError), progress.stage("build"):
        raise ValueError
    assert progress.summary() == [] and terminal.getvalue().endswith("\r\x1b[2K\x1b[?25h\r")


def test_others_may_draw_meanwhile(terminal: Terminal) -> None:
    progress = Progress(stream=terminal)
    with progress.stage("export"):
        with progress_module.aside() as draws:
            assert draws and "\x1b[?25h" in terminal.getvalue()
            length = len(terminal.getvalue())
            terminal.write("their bar\n")
        assert len(terminal.getvalue()) > length + 10  # ours is there again
    with Progress(stream=io.StringIO()).stage("export"), progress_module.aside() as draws:
        assert not draws


def test_reader_that_is_gone_does_not_stop_the_work() -> None:
    stream = io.StringIO()
    progress = Progress(stream=stream)
    stream.close()
    progress.say("nobody hears this")


def test_nothing_is_imported_to_draw_before_something_is_drawn() -> None:
    code = (
        "import sys; from bertile.base.progress import Progress; Progress().say('said');"
        "print('rich' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"
