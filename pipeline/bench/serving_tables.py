"""Writes the reports of `serving` as tables: text, Markdown or CSV."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bertile.base.tables import table
from bertile.bench.result_tables import circumstances, rows_as_csv

Report = dict[str, Any]

WHAT = ("model", "engine", "precision", "streams")
HOW = ("callers", "beside", "batch", "length")
FIGURES = ("calls_per_s", "tokens_per_s", "p50_ms", "p90_ms", "p99_ms", "cores")
RATIOS = ("p50_ms_ratio", "p99_ms_ratio", "calls_per_s_ratio")
HEADER = (*WHAT, *HOW, "calls/s", "tokens/s", "p50 ms", "p90 ms", "p99 ms", "cores")
HEADER += ("p50 vs engine", "p99 vs engine", "calls/s vs engine")
WAITING = (*WHAT, "processor seconds a second")
MEANINGS = (
    "streams: calls answered at once, which divide the threads; beside: what else the machine did;"
    " a latency counts from the moment that a request was due; cores: processor seconds a second."
    " vs engine: Bertile's figure divided by this engine's; below 1 Bertile's latency is lower,"
    " above 1 it answers more calls a second."
)
BURNT = "What a model burns that is loaded, has answered, and waits."


def as_table(reports: Sequence[Report], markdown: bool = False) -> str:
    """The rows of all reports, how they were measured, and what waiting models burn."""
    rows = [_cells(report, row) for report in reports for row in report["rows"]]
    waiting = [
        (*_what(report, row), round(row["cpu_per_s"], 4))
        for report in reports
        for row in report["waiting"]
    ]
    return "\n\n".join(
        [
            table(HEADER, rows, markdown),
            circumstances(reports, _how(reports[0]), MEANINGS),
            BURNT,
            table(WAITING, waiting, markdown),
        ]
    )


def as_csv(reports: Sequence[Report]) -> str:
    """The rows of the first table with full precision, and in each the version and the machine."""
    return rows_as_csv(reports, (*WHAT, *HOW, "calls", *FIGURES, *RATIOS), "rate")


def place_of(reports: Sequence[Report]) -> str:
    """The name of the markers that a table belongs to, by what it compares."""
    rows = [row for report in reports for row in report["rows"]]
    if len({row["beside"] for row in rows}) > 1:
        return "bench-load"
    return "bench-streams" if len({row["streams"] for row in rows}) > 1 else "bench-traffic"


def _how(report: Report) -> str:
    each = (
        f"{report['repeat']} calls of each engine"
        if report["seconds"] is None
        else f"{report['seconds']:g} seconds of each engine"
    )
    back_to_back = "each caller sends when it has its answer"
    return (
        f"{each}, {report['rate']:g} requests a second"
        if report["rate"]
        else (f"{each}, {back_to_back}")
    )


def _cells(report: Report, row: dict[str, Any]) -> tuple[Any, ...]:
    ours = row["engine"] == "bertile"
    return (
        *_what(report, row),
        *(row[name] for name in HOW),
        round(row["calls_per_s"], 1),
        round(row["tokens_per_s"]),
        *(row[name] for name in ("p50_ms", "p90_ms", "p99_ms", "cores")),
        *(None if ours else row[name] for name in RATIOS),
    )


def _what(report: Report, row: dict[str, Any]) -> tuple[Any, ...]:
    name = row["engine"]
    version = report["versions"][name]
    shown = name if version.startswith("Bertile") and name != "bertile" else version
    return row["model"], shown, row["precision"], row["streams"]
