"""The table of pruned models beside other engines, and what is said under it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bertile.base.progress import Progress
from bertile.config import Config
from bertile.studies import sparse_bench
from bertile.studies.sparse_bench import Case, as_table, crossovers, run_cases, sentence
from bertile.studies.sparse_curve import DENSE, SPARSE, Row

SOME = (Case("int8", 0.9, "4x1", 1, 128, 0.5), Case("int8", 0.9, "4x1", 1, 32, 1.0))
OTHER = Case("fp32", 0.9, "unstructured", 8, 128, 1.0)


def answer(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Benchmarks in which Bertile takes a ms for 16 tokens, and its peer twice that."""
    asked: list[tuple] = []

    def run(models: list[str], config: Config, progress: Progress, **choices: Any) -> list[dict]:
        asked.append((models, config.precision, choices))
        rows = []
        for length in choices["lengths"]:
            size = {"batch": choices["batches"][0], "length": length}
            for name, factor, best in (("bertile", 1, 0.5), ("openvino", 2, None)):
                time = factor * length / 16
                rows.append({"engine": name, "median_ms": time, "best_ratio": best, **size})
        versions = {"bertile": "Bertile 1", "openvino": "OpenVINO 1"}
        return [{"rows": rows, "versions": versions}]

    monkeypatch.setattr(sparse_bench.benchmark, "bench_models", run)
    return asked


def test_curve_is_linked_by_its_way_from_the_page() -> None:
    curve = Path("pipeline/studies/sparse_curve.svg")
    shown = sparse_bench.image(curve, Path("pipeline/bench/RESULTS.md"))
    assert shown == "![Time against sparsity](../studies/sparse_curve.svg)"
    assert "](pipeline/studies/sparse_curve.svg)" in sparse_bench.image(curve, Path("README.md"))


def test_cases_of_one_model_and_batch_are_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answer(monkeypatch)
    settings = (Config(sparse="off"), Progress(-1))
    results = run_cases("bert-tiny", [SOME[0], OTHER, SOME[1]], *settings, repeat=3)
    assert [case for case, _ in results] == [SOME[0], OTHER, SOME[1]]
    assert asked == [
        (
            ["synthetic:bert-tiny@0.9:4x1"],
            "int8",
            {"batches": (1,), "lengths": [128, 32], "repeat": 3},
        ),
        (
            ["synthetic:bert-tiny@0.9:unstructured"],
            "fp32",
            {"batches": (8,), "lengths": [128], "repeat": 3},
        ),
    ]
    rows = [line.split("  ") for line in as_table(results).splitlines()[2:]]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert cells == [
        ["int8 90% 4x1", "1", "128", "8.00", "125.00", "16.00", "0.50", "0.50"],
        ["fp32 90% unstructured", "8", "128", "8.00", "1000.00", "16.00", "0.50", "1.00"],
        ["int8 90% 4x1", "1", "32", "2.00", "500.00", "4.00", "0.50", "1.00"],
    ]


def test_sentences_say_where_time_goes_and_where_zeros_begin_to_pay() -> None:
    text = sentence([("sparse", 51.6), ("attention", 30.2), ("first_token", 0.2)], SOME[0])
    assert text.endswith("(int8 90% 4x1, 128 tokens): sparse 52%, attention 30%.")

    def curve(dense: float) -> list[Row]:
        points = ((0.0, 20.0), (0.5, 10.0))
        ours = [Row("int8", "4x1", share, SPARSE, time, time) for share, time in points]
        return [Row("int8", "4x1", 0.0, DENSE, dense, dense), *ours]

    assert "int8 4x1 from 25%, int8 4x1 never of the" in crossovers([curve(15.0), curve(5.0)])


def test_cases_have_their_goals_and_cover_lengths_and_batches() -> None:
    goals = {case[:5]: case.goal for case in sparse_bench.CASES}
    assert goals["int8", 0.9, "4x1", 1, 128] == 0.5
    assert goals["fp32", 0.9, "unstructured", 1, 128] == 0.8
    assert {(case.batch, case.length) for case in sparse_bench.CASES} == {
        (1, 128),
        (1, 32),
        (1, 384),
        (8, 128),
    }
