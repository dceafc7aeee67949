"""Reports of the benchmark come in; a table as text, Markdown, CSV or in the README goes out."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bertile.errors import UsageError
from bertile.machine import busy_sentence
from bertile.tables import table

COLUMNS = (
    "model",
    "engine",
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
    "max_abs_difference",
)
HEADER = ("model", "engine", "batch", "length", "median ms", "p90 ms", "p99 ms", "tokens/s")
HEADER += ("peak %", "bertile / it", "bertile / best")
OPEN, CLOSE = "<!-- bench -->", "<!-- /bench -->"

Report = dict[str, Any]


def as_table(reports: Sequence[Report], markdown: bool = False) -> str:
    """The rows of all reports, and what they were measured on."""
    rows = [_cells(report, row) for report in reports for row in report["rows"]]
    return f"{table(HEADER, rows, markdown)}\n\n{facts(reports)}"


def as_csv(reports: Sequence[Report]) -> str:
    """The rows with full precision, and in each the versions, threads and processor."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow((*COLUMNS, "version", "threads", "repeat", "cpu", "others_percent", "time"))
    for report in reports:
        rest = (report["threads"], report["repeat"], report["cpu"])
        rest += (report["busy"]["others_percent"], report["time"])
        for row in report["rows"]:
            version = report["versions"][row["engine"]]
            writer.writerow((*(row.get(name) for name in COLUMNS), version, *rest))
    return text.getvalue().rstrip("\n")


def facts(reports: Sequence[Report]) -> str:
    """One paragraph: processor, threads, peak, date, how busy the machine was, what is missing."""
    first = reports[0]
    peaks = sorted({round(report["peak_gflops"]) for report in reports})
    busiest = max((report["busy"] for report in reports), key=lambda b: b["others_percent"] or 0)
    lines = [
        f"{first['cpu']}; {first['threads']} threads; peak {'-'.join(map(str, peaks))} GFLOP/s;"
        f" {first['repeat']} calls of each engine, in turns, after warm-up; {first['time']}.",
        "bertile / it: Bertile's median divided by that engine's, below 1 where Bertile is faster;"
        " bertile / best: by the fastest other engine's.",
        f"{busy_sentence(busiest)[0].upper()}{busy_sentence(busiest)[1:]}.",
    ]
    notes = dict.fromkeys(note for report in reports for note in report["notes"])
    return "\n".join([*lines, *(f"{note[0].upper()}{note[1:]}." for note in notes)])


def update_readme(path: Path, reports: Sequence[Report], command: str) -> None:
    """Put the table between the markers of a file; UsageError where it lacks them."""
    text = path.read_text(encoding="utf-8")
    block = f"{OPEN}\n{as_table(reports, markdown=True)}\n\nMade by `{command}`.\n{CLOSE}"
    found = re.compile(f"{re.escape(OPEN)}.*?{re.escape(CLOSE)}", re.DOTALL)
    if len(found.findall(text)) != 1:
        raise UsageError(
            f"{path} has no place for the table", f"write {OPEN} and {CLOSE} into it once, in order"
        )
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(found.sub(lambda _: block, text), encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _cells(report: Report, row: dict[str, Any]) -> tuple[Any, ...]:
    ours = row["engine"] == "bertile"
    return (
        row["model"],
        report["versions"][row["engine"]],
        row["batch"],
        row["length"],
        row["median_ms"],
        row["p90_ms"],
        row["p99_ms"],
        round(row["tokens_per_s"]),
        round(row["peak_percent"]),
        None if ours else row["ratio"],
        row["best_ratio"],
    )
