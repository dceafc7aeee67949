"""The acceptance table: which peer counts as the best, what is said of cases without an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bertile.base.errors import ModelError
from bertile.base.progress import Progress
from bertile.bench import competitors
from bertile.bench.workloads import Mix
from bertile.config import Config
from bertile.numerics.precision import PRECISIONS
from bertile.studies import acceptance
from bertile.studies.acceptance import BASE, CASES, MIXED, Case


def row(engine: str, milliseconds: float, precision: str = "fp32", **changes: Any) -> dict:
    same = {"cosine": 1.0, "max_abs_difference": 0.0}
    numbers = {"median_ms": milliseconds, "best_ratio": None, "length": 16}
    return {"engine": engine, "precision": precision, **numbers, **same, **changes}


def report(rows: list[dict], notes: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        "rows": rows,
        "versions": {row["engine"]: row["engine"].title() for row in rows},
        "threads": 2,
        "repeat": 3,
        "cpu": "a processor",
        "peaks_gflops": {"fp32": 1000.0},
        "busy": {"others_percent": 1.0, "load": []},
        "notes": list(notes),
        "time": "2026-01-01",
    }


def run(
    monkeypatch: pytest.MonkeyPatch, cases: list[Case], *rows: dict
) -> tuple[list, list, list, list]:
    """The outcomes, reports and notes of cases whose requests all have these rows; what was asked.

    A model called broken cannot be compiled.
    """
    asked: list[tuple] = []

    def bench_models(
        targets: list[str], config: Config, progress: Progress, **choices: Any
    ) -> list:
        asked.append((targets, config.precision, choices))
        if targets == ["broken"]:
            raise ModelError("it is broken")
        if targets == ["stopped"]:
            raise KeyboardInterrupt
        texts = [str(getattr(length, "text", length)) for length in choices["lengths"]]
        lengths = [int(text) if text.isdecimal() else text for text in texts]
        return [report([{**row, "length": length} for length in lengths for row in rows])]

    monkeypatch.setattr(acceptance.benchmark, "bench_models", bench_models)
    *_, measured = acceptance.run_cases(cases, Config(), Progress(-1), repeat=3)
    return (*measured, asked)


def test_best_peer_is_the_fastest_of_the_same_model_in_the_same_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [
        row("bertile", 4.0, "int8"),
        row("openvino", 8.0, "int8"),
        row("torch", 2.0, "int8", cosine=0.1),  # of another model
        row("onnxruntime", 3.0, "fp32"),
    ]
    (outcome,), _, _, _ = run(monkeypatch, [Case("minilm", "int8", 1, 16, 0.45)], *rows)
    assert outcome.best["engine"] == "openvino" and outcome.ratio == 0.5
    line = acceptance.as_table([outcome]).splitlines()[-1].split("  ")
    cells = [cell.strip() for cell in line if cell.strip()]
    assert cells == ["minilm, int8, 1 × 16", "4.00", "8.00", "Openvino, int8", "0.50", "0.45", "no"]
    assert "0 of 1 cases keep their bound." in acceptance.summary([outcome])


def test_peer_with_a_precision_in_its_name_counts_in_any(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row("bertile", 4.0, "fp32"), row("openvino:int8", 2.0, "int8"), row("torch", 8.0)]
    outcomes, _, _, _ = run(monkeypatch, [Case("minilm", "fp32", 1, 16, 0.55)], *rows)
    assert outcomes[0].best["engine"] == "openvino:int8" and outcomes[0].ratio == 2.0
    assert "a peer leads in: minilm, fp32, 1 × 16" in acceptance.summary(outcomes)


def test_one_run_of_the_engines_answers_cases_of_one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [Case("minilm", "fp32", batch, length, 0.9) for batch in (1, 8) for length in (16, 32)]
    outcomes, _, _, asked = run(monkeypatch, cases, row("bertile", 4.0))
    assert [(choices["batches"], choices["lengths"]) for _, _, choices in asked] == [
        ([1], [16, 32]),
        ([8], [16, 32]),
    ]
    assert [outcome.case for outcome in outcomes] == cases
    assert [outcome.ratio for outcome in outcomes] == [None] * 4
    assert "4 could not be compared" in acceptance.summary(outcomes)


def test_case_that_fails_is_told_and_the_others_are_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cases = [Case("broken", "fp32", 1, 16, 0.9), Case("minilm", "fp32", 32, MIXED, 0.9)]
    rows = (row("bertile", 4.0), row("torch", 8.0))
    outcomes, reports, notes, _ = run(monkeypatch, cases, *rows)
    assert notes == ["broken, fp32, 1 × 16 was not measured: it is broken"] and len(reports) == 1
    assert outcomes[1].ratio == 0.5 and outcomes[1].case.name == "minilm, fp32, 32 × 8-128"
    assert acceptance.as_table(outcomes).splitlines()[2].split("  ")[-1].strip() == "-"


def test_unknown_precision_is_a_note_until_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bertile.driver.compile", lambda *arguments: pytest.fail("compiled"))
    case = Case(BASE, "int3", 1, 16, 0.55)
    *_, measured = acceptance.run_cases([case], Config(), Progress(-1))
    (outcome,), reports, (note,) = measured
    assert "precision 'int3' is unknown" in note and reports == [] and outcome.ours is None


def test_cases_name_models_and_peers_that_are_known() -> None:
    assert len({case.name for case in CASES}) == len(CASES) == 52
    for case in CASES:
        known = case.precision if case.precision in PRECISIONS else "int8"
        for peer in case.peers:
            competitors.parse(peer, known)
        assert isinstance(case.length, (int, Mix)) and 0 < case.at_most < 1


def test_table_goes_into_a_page(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    page = tmp_path / "RESULTS.md"
    page.write_text("<!-- bench-acceptance -->\nold\n<!-- /bench-acceptance -->\n")
    asked: list[str] = []

    def bench_models(targets: list[str], *_: Any, **choices: Any) -> list:
        asked.extend(targets)
        assert choices["against"] == ("torch",) and choices["repeat"] == 2
        return [report([row("bertile", 1.0, "int8"), row("torch", 2.0, "int8")])]

    monkeypatch.setattr(acceptance.benchmark, "bench_models", bench_models)
    monkeypatch.setattr(acceptance, "__spec__", type("Spec", (), {"name": "acceptance"}))
    line = [
        "--only",
        "minilm",
        "1 × 16",
        "--against",
        "torch",
        "--repeat",
        "2",
        "--into",
        str(page),
    ]
    acceptance.main(line)
    assert asked == ["minilm"] and "1 of 1 cases keep" in capsys.readouterr().out
    text = page.read_text()
    assert "| minilm, int8, 1 × 16 |" in text and "--only minilm" in text and "old" not in text


def test_what_was_measured_before_ctrl_c_is_in_the_table(monkeypatch):
    models = (BASE, "stopped", "never asked")
    cases = [Case(model, "fp32", 1, 16, 0.9, ("openvino",)) for model in models]
    rows = (row("bertile", 1.0), row("openvino", 2.0))
    outcomes, _, notes, asked = run(monkeypatch, cases, *rows)
    assert [outcome.ratio for outcome in outcomes] == [0.5, None, None]
    assert notes == ["Stopped by Ctrl-C at stopped, fp32, 1 × 16."] and len(asked) == 2


def test_page_has_what_was_measured_before_a_run_is_killed(monkeypatch, tmp_path):
    """Behind each run of the engines, since a signal that nothing catches leaves no time."""
    page = tmp_path / "page.md"
    page.write_text("<!-- bench-acceptance -->\n<!-- /bench-acceptance -->\n")

    def bench_models(targets: list[str], *_: Any, lengths: list, **__: Any) -> list:
        if targets != ["minilm"]:
            raise SystemExit  # as a handler of SIGTERM would
        return [report([row("bertile", 1.0, "int8"), row("openvino", 2.0, "int8")])]

    monkeypatch.setattr(acceptance.benchmark, "bench_models", bench_models)
    monkeypatch.setattr(
        acceptance,
        "CASES",
        [Case(model, "int8", 1, 16, 0.9, ("openvino",)) for model in ("minilm", "killed")],
    )
    with pytest.raises(SystemExit):
        acceptance.main(["--into", str(page)])
    assert "| minilm, int8, 1 × 16 |       1.00 |" in page.read_text()
