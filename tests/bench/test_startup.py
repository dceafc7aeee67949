"""Startup: every engine in a fresh process, every time."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from bertile.base.progress import Progress
from bertile.bench import startup
from bertile.bench.engines import Engine, Source


def test_each_engine_starts_anew_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    started, closed = [], []

    class Worker:
        pid = os.getpid()

        def __init__(self, engine: Engine, threads: int, cache_dir: str | None):
            started.append(engine.name)

        def receive(self) -> str:
            return "ready"

        def outputs(self, inputs: dict) -> None:
            assert inputs["input_ids"].shape == (1, 4)

        def close(self) -> None:
            closed.append(1)

    monkeypatch.setattr(startup, "start", Worker)
    engines = [Engine(name, name, "fp32", Source(Path())) for name in ("bertile", "openvino")]
    inputs = {"input_ids": np.ones((1, 4), np.int64)}
    rows = startup.startup(engines, inputs, 5_000_000, 1, None, Progress(-1))
    assert started == ["bertile", "openvino"] * startup.REPEAT and len(closed) == len(started)
    assert [row["weights_mb"] for row in rows] == [5.0, 5.0] and rows[0]["ratio"] == 1.0
    assert all(row["resident_mb"] > 1 and row["first_result_ms"] > 0 for row in rows)
