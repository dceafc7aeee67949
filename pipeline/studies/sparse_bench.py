"""Times a synthetic model, pruned to several degrees, beside other engines on the same weights: a
table, a curve, and where the time goes.

python -m bertile.studies.sparse_bench --into pipeline/bench/RESULTS.md -o pipeline/studies
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bertile import driver, loader
from bertile.backends.cpu import inspection
from bertile.base import scratch
from bertile.base.progress import Progress
from bertile.base.tables import table
from bertile.bench import benchmark, pages, result_tables
from bertile.cli.config_flags import cache_directory
from bertile.cli.option_lists import words
from bertile.config import Config
from bertile.studies import sparse_curve
from bertile.studies.sparse_curve import Row, Series, named


class Case(NamedTuple):
    """One request on one pruned model, and at most which share of the best peer's time it takes."""

    precision: str
    sparsity: float
    pattern: str
    batch: int
    length: int
    goal: float


CASES = (
    Case("int8", 0.8, "4x1", 1, 128, 0.60),
    Case("int8", 0.9, "4x1", 1, 128, 0.50),
    Case("int8", 0.95, "4x1", 1, 128, 0.50),
    Case("fp32", 0.9, "unstructured", 1, 128, 0.80),
    *(
        Case(precision, 0.9, pattern, batch, length, 1.0)
        for precision, pattern in (("int8", "4x1"), ("fp32", "unstructured"))
        for batch, length in ((1, 32), (1, 384), (8, 128))
    ),
)
POINTS = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
PEER_POINTS = (0.8, 0.9, 0.95)
# Of the peers only on the patterns of the table: forms in 8 bits take minutes to make.
CURVES = (("int8", "4x1", True), ("int8", "unstructured", False), ("fp32", "unstructured", True))
PEERS = ("onnxruntime", "openvino", "deepsparse")
NAME = "sparse_curve"
MEANINGS = (
    "Every engine has the same pruned weights, in its own form of the precision; vs fastest:"
    " Bertile's median divided by the fastest other engine's."
)


def run_cases(
    model: str, cases: Sequence[Case], config: Config, progress: Progress, **choices: Any
) -> list[tuple[Case, dict[str, Any]]]:
    """Each case with the report of a benchmark on it; `choices` are ``bench.bench``'s."""
    together: dict[tuple, list[Case]] = defaultdict(list)  # what one run of the engines answers
    for case in cases:
        together[case.precision, case.sparsity, case.pattern, case.batch].append(case)
    reports: dict[Case, dict[str, Any]] = {}
    for (precision, sparsity, pattern, batch), some in together.items():
        asked = dataclasses.replace(config, precision=precision)
        source, lengths = named(model, sparsity, pattern), [case.length for case in some]
        sizes = {"batches": (batch,), "lengths": lengths}
        (report,) = benchmark.bench_models([source], asked, progress, **sizes, **choices)
        for case in some:
            rows = [row for row in report["rows"] if row["length"] == case.length]
            reports[case] = {**report, "rows": rows}
    return [(case, reports[case]) for case in cases]


def as_table(results: Sequence[tuple[Case, dict[str, Any]]], markdown: bool = False) -> str:
    """A row a case: our time, that of each peer, our share of the best peer's, and the goal."""
    engines = dict.fromkeys(
        (row["engine"], report["versions"][row["engine"]])
        for _, report in results
        for row in report["rows"]
        if row["engine"] != "bertile"
    )
    header = ("case", "batch", "length", "Bertile ms", "samples/s")
    header += (*(f"{version} ms" for _, version in engines), "vs fastest", "at most")
    rows = []
    for case, report in results:
        times = {row["engine"]: row["median_ms"] for row in report["rows"]}
        ours = next(row for row in report["rows"] if row["engine"] == "bertile")
        rows.append(
            (
                f"{case.precision} {100 * case.sparsity:g}% {case.pattern}",
                *(case.batch, case.length, ours["median_ms"]),
                round(1e3 * case.batch / ours["median_ms"], 1),
                *(times.get(name) for name, _ in engines),
                *(ours["best_ratio"], case.goal),
            )
        )
    return table(header, rows, markdown)


def shares(model: str, case: Case, config: Config, progress: Progress) -> list[tuple[str, float]]:
    """Percent of a request's time by kind of kernel, the longest first."""
    asked = dataclasses.replace(config, precision=case.precision)
    with scratch.directory("shares-") as parent:
        directory = Path(parent) / "bundle"
        driver.compile(named(model, case.sparsity, case.pattern), directory, asked, progress)
        kinds = {
            kernel["name"]: kernel["operation"]
            for kernel in loader.read_manifest(directory)["kernels"]
        }
        report = inspection.inspect(directory, case.batch, case.length, config.threads, progress)
    totals: dict[str, float] = defaultdict(float)
    for row in report["kernels"]:
        totals[kinds[row["kernel"]]] += row["ms"]
    whole = sum(totals.values())
    ordered = sorted(totals, key=lambda kind: -totals[kind])
    return [(kind, 100 * totals[kind] / whole) for kind in ordered]


def sentence(of_kinds: Sequence[tuple[str, float]], case: Case) -> str:
    """Where the time goes, in words."""
    parts = [f"{kind} {share:.0f}%" for kind, share in of_kinds if share >= 0.5]
    what = f"{case.precision} {100 * case.sparsity:g}% {case.pattern}, {case.length} tokens"
    return f"Time by kind of kernel ({what}): {', '.join(parts)}."


def crossovers(curves: Sequence[Sequence[Row]]) -> str:
    """Where each curve gets under its dense kernels, in words."""
    parts = []
    for rows in curves:
        sparsity = sparse_curve.crossover(rows)
        where = "never" if sparsity is None else f"from {100 * sparsity:.0f}%"
        parts.append(f"{rows[0].precision} {rows[0].pattern} {where}")
    return (
        f"The sparse kernels are faster than the dense ones: {', '.join(parts)} of the weights zero"
        " (all linear layers alike; `--sparse auto` chooses for each)."
    )


def image(path: Path, page: Path) -> str:
    """Markdown that shows an image in a page, by its way from there."""
    way = Path(os.path.relpath(path, page.parent))
    return f"![Time against sparsity]({way.as_posix()})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write the curve's files, and print what was found, or put it into a page."""
    options = _parser().parse_args(arguments)
    progress, model, output = Progress(), options.model, Path(options.output)
    config = Config(
        threads=options.threads, log_dir=options.log_dir, cache_dir=cache_directory(None)
    )
    against = words(options.against)
    curves = []
    for precision, pattern, peers in CURVES:
        points = tuple(options.points)
        its_peers = tuple(point for point in PEER_POINTS if peers and point in points)
        series = Series(precision, pattern, points, its_peers, against)
        curves.append(
            sparse_curve.measure(model, series, config, options.length, options.repeat, progress)
        )
    rows = [row for curve in curves for row in curve]
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{NAME}.csv").write_text(sparse_curve.as_csv(rows), encoding="utf-8")
    title = f"{model}, {options.length} tokens"
    (output / f"{NAME}.svg").write_text(sparse_curve.as_svg(rows, title), encoding="utf-8")
    cases = [case for case in CASES if case.length <= options.longest]
    results = run_cases(model, cases, config, progress, against=against, repeat=options.repeat)
    spent = sentence(shares(model, cases[1], config, progress), cases[1])
    page = options.into and pages.split(options.into)[0]
    block = [
        as_table(results, markdown=bool(page)),
        result_tables.facts([report for _, report in results], MEANINGS),
        *((image(output / f"{NAME}.svg", page),) if page else ()),
        crossovers(curves),
        spent,
    ]
    if page:
        command = shlex.join(["python", "-m", __spec__.name, *(arguments or sys.argv[1:])])
        pages.write(options.into, "bench-sparse", "\n\n".join([*block, f"`{command}`"]))
    print("\n\n".join(block))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bertile.studies.sparse_bench")
    add = parser.add_argument
    add("--model", metavar="NAME", default="bert-base", help="of `synthetic:NAME`")
    add("--against", metavar="ENGINE", nargs="+", default=list(PEERS), help="as of bertile bench")
    add("--points", metavar="SHARE", nargs="+", type=float, default=POINTS, help="of the curve")
    add("--length", metavar="N", type=int, default=128, help="tokens of the curve's request")
    add("--longest", metavar="N", type=int, default=384, help="leave out longer cases")
    add("--repeat", metavar="N", type=int, default=30, help="timed calls of each engine")
    add("--threads", metavar="N", type=int, help="threads to use")
    add("--log-dir", metavar="DIR", help="your own tuning logs")
    add("-o", "--output", metavar="DIR", default="out/sparse", help="for the curve's two files")
    add(
        "--into",
        "--update-readme",
        metavar="FILE[#NAME]",
        type=pages.argument("bench-sparse"),
        help="put it at <!-- bench-sparse --> of a page",
    )
    return parser


if __name__ == "__main__":
    main()
