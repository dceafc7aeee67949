"""The benchmark's report as text, Markdown and CSV, and its place in a page."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest

from bertile.base.errors import UsageError
from bertile.bench import pages, result_tables
from bertile.cli import main
from bertile.studies import (
    acceptance,
    cuda_package,
    range_costs,
    server_load,
    sparse_bench,
    text_bench,
)

ROW = {
    "model": "minilm",
    "precision": "fp32",
    "batch": 1,
    "length": 16,
    "p90_ms": 4.0,
    "p99_ms": 5.0,
    "gflops": 500.0,
}


def row(engine: str, median: float, ratio: float, best: float | None) -> dict[str, Any]:
    measured = {"engine": engine, "median_ms": median, "ratio": ratio, "best_ratio": best}
    rest = {
        "tokens_per_s": 16e3 / median,
        "peak_percent": 50.0,
        "max_abs_difference": 1e-6,
        "cosine": 0.99999,
    }
    return {**ROW, **measured, **rest}


def report(**changes: Any) -> dict[str, Any]:
    return {
        "rows": [
            row("bertile", 2.0, 1.0, 0.8),
            row("onnxruntime", 3.0, 2 / 3, None),
            row("torch", 2.5, 0.8, None),
        ],
        "versions": {"bertile": "Bertile", "onnxruntime": "ONNX Runtime 1", "torch": "PyTorch 2"},
        "threads": 2,
        "repeat": 5,
        "cpu": "a processor",
        "peaks_gflops": {"fp32": 1000.0},
        "busy": {"others_percent": 1.0, "load": [0.1, 0.2, 0.3]},
        "notes": [],
        "source": "minilm",
        "time": "2026-01-01",
        **changes,
    }


def write(place: str, reports: list[dict[str, Any]], command: str) -> None:
    content = result_tables.as_table(reports, markdown=True)
    pages.write_table(place, result_tables.place_of(reports), content, command)


def test_table_is_text_markdown_or_csv() -> None:
    text = result_tables.as_table([report()])
    assert "8000" in text and "2 threads" in text and "ONNX Runtime 1" in text
    markdown = result_tables.as_table([report()], markdown=True).splitlines()
    assert markdown[0].startswith("| model") and "0.67" in markdown[3] and "0.80" in markdown[2]
    rows = list(csv.DictReader(result_tables.as_csv([report(), report()]).splitlines()))
    assert len(rows) == 6 and float(rows[1]["ratio"]) == pytest.approx(2 / 3)
    assert rows[0]["best_ratio"] and rows[1]["best_ratio"] == "" and rows[2]["threads"] == "2"


def test_new_processes_are_a_second_table() -> None:
    new = {"model": "minilm", "precision": "fp32", "batch": 1, "length": 128, "weights_mb": 90.2}
    times = {"bertile": (530.4, 1.0), "onnxruntime": (1060.8, 0.5)}
    rows = [
        {**new, "engine": name, "first_result_ms": ms, "ratio": ratio, "resident_mb": 105.5}
        for name, (ms, ratio) in times.items()
    ]
    text = result_tables.as_table([report(startup=rows)], markdown=True)
    assert text.count("| model") == 2 and "| first result ms |" in text
    line = next(line for line in text.splitlines() if "1061" in line)
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        *("minilm", "ONNX Runtime 1", "fp32", "1", "128", "1061", "0.50", "106", "90"),
    ]
    assert "first result" not in result_tables.as_table([report()])


def test_another_bundle_is_named_by_its_path_and_precisions_have_their_peaks() -> None:
    versions = {"bertile": "Bertile 1", "out/other": "Bertile 1", "openvino:int8": "OpenVINO 1"}
    rows = [{**row(name, 2.0, 1.0, None), "precision": "int8"} for name in versions]
    rows[2]["peak_percent"] = None
    peaks = [{"fp32": 235.2, "int8": 930.0}, {"fp32": 236.4}]
    reports = [report(rows=rows, versions=versions, peaks_gflops=peak) for peak in peaks]
    text = result_tables.as_table(reports)
    assert "peak GFLOP/s: fp32 235-236, int8 930" in text
    names = [re.split(r"  +", line)[1] for line in text.splitlines()[2:5]]
    assert names == ["Bertile 1", "out/other", "OpenVINO 1"]
    rows = list(csv.DictReader(result_tables.as_csv(reports[:1]).splitlines()))
    assert rows[2]["peak_percent"] == "" and rows[2]["precision"] == "int8"


def test_facts_say_that_the_machine_was_busy_and_what_was_left_out() -> None:
    busy = {"others_percent": 35.2, "load": [2.0, 1.0, 1.0]}
    text = result_tables.facts([report(), report(busy=busy, notes=["torch is left out"])])
    assert "The machine was busy: other processes took 35%" in text and "Torch is left out." in text
    assert "busy" not in result_tables.facts([report()])


def test_page_is_changed_between_the_markers_alone(tmp_path: Path) -> None:
    path = tmp_path / "RESULTS.md"
    path.write_text("above\n<!-- bench -->\nold \\1\n<!-- /bench -->\nbelow\n")
    for _ in range(2):
        write(str(path), [report()], "bertile bench \\1 minilm")
    text = path.read_text()
    assert text.startswith("above\n<!-- bench -->\n| model") and text.endswith("-->\nbelow\n")
    assert "old" not in text and "`bertile bench \\1 minilm`" in text and "2026-01-01" in text
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["bench-int8", "bench-tuning"])
def test_page_has_a_place_for_each_precision_and_for_any_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / "RESULTS.md"
    path.write_text(f"<!-- bench -->\n<!-- /bench -->\n<!-- {name} -->\n<!-- /{name} -->\n")
    rows = [{**row, "precision": "int8"} for row in report()["rows"]]
    place = str(path) if name == "bench-int8" else f"{path}#{name}"
    write(place, [report(rows=rows)], "bertile bench --precision int8")
    before, after = path.read_text().split(f"<!-- {name} -->")
    assert "| model" in after and "| model" not in before


@pytest.mark.parametrize("text", ["", "<!-- /bench --> <!-- bench -->", "<!-- bench -->"])
def test_page_without_markers_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "RESULTS.md"
    path.write_text(text)
    with pytest.raises(UsageError, match="has no place for the table"):
        write(str(path), [report()], "bertile bench")
    assert path.read_text() == text


STUDIES = {
    "bench-acceptance": (acceptance, []),
    "bench-texts": (text_bench, []),
    "bench-server": (server_load, []),
    "bench-sparse": (sparse_bench, []),
    "bench-cuda": (cuda_package, ["--table", "result.json"]),
    "range-costs": (range_costs, ["-o", "out"]),
}


@pytest.mark.parametrize("name", STUDIES)
def test_study_looks_at_its_page_before_it_measures(tmp_path: Path, capsys, name: str) -> None:
    study, needed = STUDIES[name]
    page = tmp_path / "page.md"
    page.write_text("no markers\n", encoding="utf-8")
    for place, said in ((page, f"<!-- {name} -->"), (tmp_path / "none.md", "cannot be read")):
        with pytest.raises(SystemExit) as stop:
            study.main([*needed, "--into", str(place)])
        assert stop.value.code == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("place, said", [("#other", "<!-- other -->"), ("none.md", "be read")])
def test_bench_looks_at_its_page_before_it_measures(tmp_path: Path, capsys, place, said) -> None:
    page = tmp_path / "page.md"
    page.write_text("no markers\n", encoding="utf-8")
    assert main.main(["bench", "no/such/model", "--into", f"{page}{place}"]) == 2
    assert said in capsys.readouterr().err
