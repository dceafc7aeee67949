"""Progress: plain lines without a terminal, one overwritten line with one, silence with -q."""

from __future__ import annotations

import io

import pytest

from bertile.base.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


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


def test_status_is_written_over_on_a_terminal() -> None:
    stream = Terminal()
    progress = Progress(stream=stream)
    progress.status("trial 1")
    progress.say("done")
    assert stream.getvalue() == "trial 1\r\x1b[Kdone\n"


@pytest.mark.parametrize(("verbosity", "expected"), [(-1, ""), (0, "said\n"), (1, "said\nmore\n")])
def test_verbosity_decides_what_is_said(verbosity: int, expected: str) -> None:
    stream = io.StringIO()
    progress = Progress(verbosity, stream)
    progress.say("said")
    progress.detail("more")
    assert stream.getvalue() == expected


def test_failing_stage_is_no_finished_stage_and_leaves_a_clean_line() -> None:
    stream = Terminal()
    progress = Progress(stream=stream)
    with pytest.raises(ValueError), progress.stage("build"):
        raise ValueError
    assert progress.summary() == [] and stream.getvalue().endswith("\r\x1b[K")


def test_reader_that_is_gone_does_not_stop_the_work() -> None:
    stream = io.StringIO()
    progress = Progress(stream=stream)
    stream.close()
    progress.say("nobody hears this")
