"""Writes the benchmark's reports as a table: text, Markdown or CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from bertile.base.machine import busy_sentence
from bertile.base.tables import table

COLUMNS = (
    "model",
    "engine",
    "precision",
    "batch",
    "length",
    "median_ms",
    "p90_ms",
    "p99_ms",
    "tokens_per_s",
    "gflops",
    "peak_percent",
    "ratio",
    "best_ratio",
    "cosine",
    "max_abs_difference",
)
HEADER = ("model", "engine", "precision", "batch", "length", "median ms", "p90 ms", "p99 ms")
HEADER += ("tokens/s", "peak %", "vs engine", "vs fastest", "cosine")
STARTUP = ("model", "engine", "precision", "batch", "length", "first result ms", "vs engine")
STARTUP += ("resident MB", "weights MB")
NEW_PROCESSES = (
    "First result: from the start of a new process, Python and imports included; resident: what it"
    " holds then, of which Bertile's weights take the last column; medians of 5 processes."
)
MEANINGS = (
    "peak %: of the multiply-adds that the model asks for, without zeros that Bertile skips;"
    " vs engine, vs fastest: Bertile's median time against this engine's, and against that of the"
    " fastest other library in the same precision (below 1: Bertile is faster); cosine: of the"
    " outputs to float32's."
)

Report = dict[str, Any]


def as_table(reports: Sequence[Report], markdown: bool = False) -> str:
    """The rows of all reports, what they were measured on, and the rows on new processes."""
    rows = [_cells(report, row) for report in reports for row in report["rows"]]
    parts = [table(HEADER, rows, markdown), facts(reports)]
    new = [_startup_cells(report, row) for report in reports for row in report.get("startup", ())]
    if new:
        parts += [table(STARTUP, new, markdown), NEW_PROCESSES]
    return "\n\n".join(parts)


def as_csv(reports: Sequence[Report]) -> str:
    """The rows with full precision, and in each the versions, threads and processor."""
    return rows_as_csv(reports, COLUMNS, "repeat")


def rows_as_csv(reports: Sequence[Report], columns: Sequence[str], how: str) -> str:
    """These columns of all rows, and behind them version, threads, what `how` names of the report,
    processor, how busy it was, and the time.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow((*columns, "version", "threads", how, "cpu", "others_percent", "time"))
    for report in reports:
        rest = (report["threads"], report[how], report["cpu"])
        rest += (report["busy"]["others_percent"], report["time"])
        for row in report["rows"]:
            version = report["versions"][row["engine"]]
            writer.writerow((*(row.get(name) for name in columns), version, *rest))
    return text.getvalue().rstrip("\n")


def facts(reports: Sequence[Report], columns: str = MEANINGS) -> str:
    """One paragraph: processor, threads, peak, date, what columns mean, how busy the machine was,
    what is missing.
    """
    how = f"{_peaks(reports)}; {reports[0]['repeat']} calls of each engine"
    return circumstances(reports, how, columns)


def circumstances(reports: Sequence[Report], how: str, columns: str) -> str:
    """The same paragraph for any measurement; `how` says what was measured, and how often."""
    first = reports[0]
    busiest = max((report["busy"] for report in reports), key=lambda b: b["others_percent"] or 0)
    lines = [
        f"{first['cpu']}; {first['threads']} threads; {how}, in turns, after warm-up;"
        f" {first['time']}.",
        columns,
        f"{busy_sentence(busiest)[0].upper()}{busy_sentence(busiest)[1:]}.",
    ]
    notes = dict.fromkeys(note for report in reports for note in report["notes"])
    return "\n".join([*lines, *(f"{note[0].upper()}{note[1:]}." for note in notes)])


def place_of(reports: Sequence[Report]) -> str:
    """The name of the markers that a table belongs to: that of its precision."""
    precision = next(r["precision"] for r in reports[0]["rows"] if r["engine"] == "bertile")
    return "bench" if precision == "fp32" else f"bench-{precision}"


def _peaks(reports: Sequence[Report]) -> str:
    """The least and the most that was measured in each precision."""
    peaks_of: dict[str, set[int]] = {}
    for report in reports:
        for precision, peak in report["peaks_gflops"].items():
            peaks_of.setdefault(precision, set()).add(round(peak))
    texts = [
        f"{name} {min(peaks)}" + (f"-{max(peaks)}" if len(peaks) > 1 else "")
        for name, peaks in peaks_of.items()
    ]
    return f"peak GFLOP/s: {', '.join(texts)}"


def _cells(report: Report, row: dict[str, Any]) -> tuple[Any, ...]:
    return (
        *_what(report, row),
        row["median_ms"],
        row["p90_ms"],
        row["p99_ms"],
        round(row["tokens_per_s"]),
        row["peak_percent"] and round(row["peak_percent"]),
        None if row["engine"] == "bertile" else row["ratio"],
        row["best_ratio"],
        f"{row['cosine']:.4f}",
    )


def _startup_cells(report: Report, row: dict[str, Any]) -> tuple[Any, ...]:
    return (
        *_what(report, row),
        round(row["first_result_ms"]),
        None if row["engine"] == "bertile" else row["ratio"],
        round(row["resident_mb"]),
        round(row["weights_mb"]),
    )


def _what(report: Report, row: dict[str, Any]) -> tuple[Any, ...]:
    """The cells that say what a row of either table is about."""
    return row["model"], _name(report, row), row["precision"], row["batch"], row["length"]


def _name(report: Report, row: dict[str, Any]) -> str:
    """The engine with its version; another bundle by its path."""
    version = report["versions"][row["engine"]]
    ours = version.startswith("Bertile") and row["engine"] != "bertile"
    return row["engine"] if ours else version
