"""A worker opens what it is told to, in its own process, and applies functions there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers import calculator

from bertile.base.errors import BertileError
from bertile.bench.engines import Engine, Source
from bertile.bench.workers import Worker


def test_an_opener_of_its_own_opens_and_functions_are_applied_there() -> None:
    engine = Engine("calculator", "of no known kind", "fp32", Source(Path()))
    worker = Worker(engine, 2, calculator.opened)
    try:
        assert worker.receive() == "calculator with 2 threads"
        assert worker.apply(calculator.applied, 3) == (4.0, worker.pid)
        assert worker.pid != os.getpid()
        with pytest.raises(BertileError, match="calculator: ZeroDivisionError"):
            worker.apply(calculator.applied, 0)
    finally:
        worker.close()
