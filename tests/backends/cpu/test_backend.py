"""What `inspect` says below its table: the call, how busy the machine was, and what that shows."""

from __future__ import annotations

import pytest

from bertile.backends.cpu.backend import backend

REPORT = {
    "kernels": [{"kernel": "dense", "peak %": 91.0}, {"kernel": "cast", "peak %": None}],
    "batch": 1,
    "length": 128,
    "threads": 2,
    "total_ms": 5.0,
    "between_kernels_ms": 0.25,
    "peak_gflops": 235.0,
    "busy": {"others_percent": 1.0, "load": [1.5]},
}


def test_summary_of_a_quiet_machine() -> None:
    first, second = backend.summary(REPORT).splitlines()
    assert first == (
        "1 x 128 tokens, 2 threads: 5.00 ms, of it 0.25 ms between kernels; peak 235 GFLOP/s"
    )
    assert second == "other processes took 1% of the machine's CPU time (load average 1.5)"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"busy": {"others_percent": 40.0, "load": []}}, "the machine was busy"),
        ({"kernels": [{"kernel": "dense", "peak %": 120.0}]}, "more than 100% of a peak"),
        ({"between_kernels_ms": -3.0}, "of it 0.00 ms between kernels"),
    ],
)
def test_summary_says_what_a_busy_machine_does_to_numbers(change, said) -> None:
    assert said not in backend.summary(REPORT)
    assert said in backend.summary({**REPORT, **change})
