"""Instructions of a text are the difference between a few calls and a few more."""

from __future__ import annotations

import sys

import pytest

from bertile.bench import instructions
from bertile.bench.instructions import Counter

# Counts nothing: says what a command takes of which loading takes 900, and each call 5000.
SCRIPT = """
import sys
times = int(sys.argv[-1]) if sys.argv[-1].isdecimal() else 0
print(f"==1== I   refs:      {900 + 5000 * times:,}", file=sys.stderr)
"""
FAKE = Counter("fake", (sys.executable, "-c", SCRIPT), instructions.COUNTERS[1].said)


def test_loading_is_left_out(tmp_path):
    assert instructions.of_text(tmp_path, 16, FAKE) == 5000


@pytest.mark.parametrize(
    ("said", "count"),
    [
        ("512345;;instructions:u;401;100.00", 512345),
        ("<not supported>;;instructions:u;0;100", None),
    ],
)
def test_what_perf_says_is_read(said, count):
    script = f"import sys; print({said!r}, file=sys.stderr)"
    perf = Counter("perf", (sys.executable, "-c", script), instructions.COUNTERS[0].said)
    assert perf.count(["true"]) == count


def test_who_is_missing_or_counts_nothing_is_not_chosen():
    missing = Counter("missing", ("no-such-program",), r"(\d+)")
    silent = Counter("silent", (sys.executable, "-c", ""), r"(\d+)")
    assert instructions.counter([missing, silent, FAKE]) is FAKE
    assert instructions.counter([missing, silent]) is None


def test_a_command_that_fails_is_not_counted():
    script = f"{SCRIPT}\nsys.exit(1)"
    failing = Counter("failing", (sys.executable, "-c", script), FAKE.said)
    assert failing.count(["true"]) is None
