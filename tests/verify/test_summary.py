"""A compile's kernels in words: whose they are, how they were chosen, on which processor."""

from __future__ import annotations

import pytest

from bertile.verify import summary

ZEN = "AMD family 25 model 17"


def kernel(provenance: str, processor: str | None = None) -> dict:
    record = {"record": {"measured_on": processor, "at": "2026-11-21"}} if processor else {}
    return {"provenance": provenance, **record}


@pytest.mark.parametrize(
    ("kernels", "text"),
    [
        (
            [kernel("tuned", ZEN)] * 7 + [kernel("default")] * 2 + [kernel("generic")] * 9,
            f"9 kernels of Bertile (7 tuned on {ZEN}, 2 defaults), 9 of TVM",
        ),
        (
            [kernel("tuned elsewhere", ZEN), kernel("generic")],
            f"1 kernel of Bertile (1 tuned on another processor: {ZEN}), 1 of TVM",
        ),
        (
            [kernel("nearest", ZEN), kernel("estimated", "cortex-a76 by llvm-mca")],
            "2 kernels of Bertile (1 chosen by estimate, 1 with settings of a similar shape),"
            " 0 of TVM",
        ),
        ([kernel("generic")], "0 kernels of Bertile, 1 of TVM"),
    ],
)
def test_kernels_in_words(kernels: list[dict], text: str) -> None:
    assert summary.in_words(kernels) == text
