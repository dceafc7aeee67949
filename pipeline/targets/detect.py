"""Finds what of CUDA this machine has: a card, and a compiler for kernels."""

from __future__ import annotations

from bertile.base.errors import PlatformError
from bertile.cuda_loader import Gpu, open_driver
from bertile.targets.rows import TABLE, Target


def gpu() -> Gpu | str:
    """The first GPU, or why there is none."""
    try:
        driver = open_driver()
    except PlatformError:
        return "this machine has no NVIDIA driver"
    try:
        return Gpu(driver)
    except PlatformError as error:
        return error.what


def rows(card: Gpu) -> list[Target]:
    """The rows whose machine code a card runs: those of its generation, as old as it or older."""
    major, minor = card.capability
    return [
        row
        for row in TABLE
        if row.gpu and row.gpu.capability // 10 == major and row.gpu.capability % 10 <= minor
    ]
