"""The tables of texts: medians, the fastest peer of a precision, what is kept and what is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bertile.bench.engines import Engine, Source
from bertile.studies import text_tables
from bertile.studies.text_calls import Pass

TRUE = np.eye(4, 8, dtype=np.float32)


def engine(kind: str, precision: str = "fp32") -> Engine:
    return Engine(f"{kind} {precision}", kind, precision, Source(Path(), model="minilm"))


def row(kind: str, seconds: float, milliseconds: float, vectors=TRUE, precision="fp32") -> dict:
    passes = [Pass(vectors, seconds * factor, 0.05) for factor in (3, 1, 0.5)]
    times = [milliseconds] * 99 + [milliseconds * 4]
    return text_tables.row_of(engine(kind, precision), passes, times, TRUE)


def report(rows: list[dict]) -> dict:
    return {
        "rows": rows,
        "versions": {row["engine"]: row["engine"].title() for row in rows},
        "texts": 1000,
        "lengths": [16, 17, 40],
        "queries": 100,
        "rounds": 3,
        "threads": 2,
        "busy": {"others_percent": 1.0, "load": []},
        "cpu": "a processor",
        "parts": ["A sentence."],
        "notes": ["fastembed is left out: it is not there"],
        "time": "2026-01-01",
    }


def test_a_row_has_the_median_pass_and_the_least_cosine() -> None:
    turned = TRUE.copy()
    turned[0] = np.roll(TRUE[0], 1)
    line = row("openvino", 2.0, 1.0, turned)
    assert line["seconds"] == 2.0 and line["p50"] == 1.0 and 1 < line["p99"] <= 4
    assert line["cosine"] == 0 and line["mean"] == pytest.approx(0.75)


def test_bounds_are_compared_with_the_fastest_peer_of_the_same_model() -> None:
    rows = [
        row("bertile", 1.0, 1.0),
        row("openvino", 1.6, 3.0),
        row("st-torch", 4.0, 1.9),
        row("llamacpp", 0.1, 0.1, np.roll(TRUE, 1, axis=1)),  # of another model
        row("fastembed", 0.2, 0.2, precision="int8"),
    ]
    text = text_tables.said(report(rows))
    assert "fp32: 1.60 times the fastest peer, openvino fp32 (asked: 1.5, kept)" in text
    assert "5.0% is not the model (asked: 8%, kept)" in text
    assert "fp32: 0.53 of the best peer's median, st-torch fp32 (asked: 0.55, kept)" in text
    assert "ahead in p99" in text and "Llamacpp fp32's vectors have a mean cosine of 0.0000" in text
    assert "Fastembed is left out: it is not there." in text
    assert "3 English texts of 16 to 40 tokens, mean 24, median 17" in text
    ratios = [line.split()[5] for line in text.splitlines() if line.startswith("Openvino")]
    assert ratios == ["1.60", "0.33"]


def test_what_is_slower_than_asked_is_said() -> None:
    text = text_tables.said(report([row("bertile", 1.0, 1.0), row("openvino", 1.2, 1.1)]))
    assert "1.20 times the fastest peer, openvino fp32 (asked: 1.5, not kept)" in text
    assert "0.91 of the best peer's median, openvino fp32 (asked: 0.55, not kept)" in text
