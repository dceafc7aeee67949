"""Times every case that has a bound beside every peer that can be had, in turns: one table.

python -m bertile.studies.acceptance --into pipeline/bench/RESULTS.md
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from bertile.base.errors import BertileError
from bertile.base.progress import Progress
from bertile.base.tables import table
from bertile.bench import benchmark, pages, result_tables, sameness
from bertile.bench.workloads import Mix, parse_mix
from bertile.cli.config_flags import cache_directory
from bertile.cli.option_lists import words
from bertile.config import Config
from bertile.numerics.precision import PRECISIONS

PEERS = ("onnxruntime", "openvino", "torch", "torch-compile", "deepsparse", "llamacpp")
# torch-compile makes code for each size; of a length of thousands the others take minutes.
LONG_PEERS = ("onnxruntime", "openvino")
ANY_PRECISION = (
    *("onnxruntime:int4", "onnxruntime:int8", "openvino:int8", "openvino:bf16"),
    *("torch-compile:int8", "deepsparse:int8", "llamacpp:int4", "llamacpp:int8"),
)
# llama.cpp has none of the younger families, or reads them from files that we cannot make here.
YOUNG_PEERS = tuple(peer for peer in PEERS if peer != "llamacpp")
BASE, LONG, MINILM = "synthetic:bert-base", "synthetic:bert-long", "minilm"
MIXED = parse_mix("8-128")
# Of families younger than BERT: at most, at 128 tokens. Qwen3-0.6B has four of its layers.
YOUNG = {
    "modernbert-base": {"fp32": 0.88, "bf16": 0.78, "int8": 0.70},
    "nomic-bert-base": {"fp32": 0.85, "int8": 0.70},
    "deberta-v3-base": {"fp32": 0.85, "int8": 0.70},
    "qwen3-short": {"fp32": 0.90, "int8": 0.75},
}
MEANINGS = (
    "Ratio: Bertile's median divided by that of the fastest peer in the same precision (of int4, in"
    " any), whose outputs are those of the model; at most: what it may be."
)


class Case(NamedTuple):
    """One request, and at most which share of the best peer's time it may take.

    A `peer` with a precision in its name counts whatever Bertile's precision is.
    """

    model: str
    precision: str
    batch: int
    length: int | Mix
    at_most: float
    peers: tuple[str, ...] = PEERS

    @property
    def name(self) -> str:
        """How the table calls it."""
        length = self.length.text if isinstance(self.length, Mix) else self.length
        model = self.model.removeprefix("synthetic:")
        return f"{model}, {self.precision}, {self.batch} × {length}"


CASES = (
    *(
        Case(BASE, precision, 1, 128, at_most)
        for precision, at_most in (("fp32", 0.90), ("bf16", 0.78), ("int8", 0.72))
    ),
    *(
        Case(BASE, "int8", 1, length, at_most)
        for length, at_most in ((16, 0.70), (32, 0.65), (64, 0.60), (384, 0.78), (512, 0.80))
    ),
    *(
        Case(LONG, precision, 1, length, 0.90, LONG_PEERS)
        for precision in ("fp32", "int8")
        for length in (2048, 8192)
    ),
    *(
        Case(BASE, precision, 8, 128, at_most)
        for precision, at_most in (("fp32", 0.93), ("bf16", 0.90), ("int8", 0.80))
    ),
    # peers get the same batch padded to its longest sequence
    *(
        Case(BASE, precision, 32, MIXED, at_most, tuple(p for p in PEERS if p != "llamacpp"))
        for precision, at_most in (("fp32", 0.48), ("int8", 0.43))
    ),
    *(
        Case(f"{BASE}@{sparsity}:4x1", "int8", 1, 128, at_most, ("deepsparse",))
        for sparsity, at_most in ((0.8, 0.48), (0.9, 0.40), (0.95, 0.38))
    ),
    *(
        Case(MINILM, "int8", batch, length, 0.85)
        for batch in (1, 8)
        for length in (16, 32, 64, 128, 384)
    ),
    Case(BASE, "int4", 1, 16, 0.55, ANY_PRECISION),
    *(
        Case(f"synthetic:{model}", precision, 1, length, at_most, YOUNG_PEERS)
        for model, bounds in YOUNG.items()
        for precision, at_128 in bounds.items()
        for length, at_most in ((128, at_128), (16, 0.85))
    ),
    *(
        Case(f"synthetic:{model}", "fp32", 1, length, at_most, LONG_PEERS)
        for model, length, at_most in (
            ("modernbert-long", 2048, 0.60),
            ("modernbert-long", 8192, 0.60),
            ("bge-m3-short", 8192, 0.90),
        )
    ),
)


class Outcome(NamedTuple):
    """A case with the rows of its request, Bertile's first; none where it was not measured."""

    case: Case
    rows: list[dict[str, Any]]
    versions: dict[str, str]

    @property
    def ours(self) -> dict[str, Any] | None:
        """Bertile's row."""
        return next((row for row in self.rows if row["engine"] == "bertile"), None)

    @property
    def best(self) -> dict[str, Any] | None:
        """The row of the fastest peer that has computed the same model in such a precision."""
        precision = self.case.precision
        same = (precision, PRECISIONS[precision].peer) if precision in PRECISIONS else ()
        peers = [
            row
            for row in self.rows
            if row["engine"] != "bertile"
            and (":" in row["engine"] or row["precision"] in same)
            and sameness.doubt(row) is None
        ]
        return min(peers, key=lambda row: row["median_ms"], default=None)

    @property
    def ratio(self) -> float | None:
        """Bertile's time divided by the best peer's; None where one of them is missing."""
        ours, best = self.ours, self.best
        return ours["median_ms"] / best["median_ms"] if ours and best else None


class Measured(NamedTuple):
    """Each case with what came of it, the benchmark's reports, and a sentence on each case that
    could not be measured.
    """

    outcomes: list[Outcome]
    reports: list[dict[str, Any]]
    notes: list[str]


def run_cases(
    cases: Sequence[Case], config: Config, progress: Progress, **choices: Any
) -> Iterator[Measured]:
    """What was measured so far, behind each run of the engines; the last is all of it.

    `choices` are ``benchmark.bench``'s.
    """
    groups: dict[tuple, list[Case]] = {}  # what one run of the engines answers
    for case in cases:
        key = (case.model, case.precision, case.batch, case.peers)
        groups.setdefault(key, []).append(case)
    outcomes: dict[Case, Outcome] = {}
    reports: list[dict[str, Any]] = []
    notes: list[str] = []

    def so_far() -> Measured:
        every = [outcomes.get(case, Outcome(case, [], {})) for case in cases]
        return Measured(every, list(reports), list(notes))

    for (model, precision, batch, peers), group in groups.items():
        report: dict[str, Any] = {"rows": [], "versions": {}}
        try:
            (report,) = benchmark.bench_models(
                [model],
                dataclasses.replace(config, precision=precision),
                progress,
                against=peers,
                batches=[batch],
                lengths=[case.length for case in group],
                **choices,
            )
            reports.append(report)
        except BertileError as error:  # the other cases are measured all the same
            notes += [f"{case.name} was not measured: {error}" for case in group]
        except KeyboardInterrupt:  # what was measured is worth a table
            notes.append(f"Stopped by Ctrl-C at {group[0].name}.")
            break
        for case in group:
            length = case.length.text if isinstance(case.length, Mix) else case.length
            rows = [row for row in report["rows"] if row["length"] == length]
            outcomes[case] = Outcome(case, rows, report["versions"])
        yield so_far()
    yield so_far()


def as_table(outcomes: Sequence[Outcome], markdown: bool = False) -> str:
    """A row a case: our time, the best peer's and its name, our share of it, and the bound."""
    header = ("case", "Bertile ms", "best peer ms", "best peer", "ratio", "at most", "kept")
    return table(header, [_cells(outcome) for outcome in outcomes], markdown)


def _cells(outcome: Outcome) -> tuple[Any, ...]:
    ours, best, ratio = outcome.ours, outcome.best, outcome.ratio
    peer = f"{outcome.versions[best['engine']]}, {best['precision']}" if best else None
    kept = None if ratio is None else ("yes" if ratio <= outcome.case.at_most else "no")
    return (
        outcome.case.name,
        ours and ours["median_ms"],
        best and best["median_ms"],
        peer,
        ratio,
        outcome.case.at_most,
        kept,
    )


def summary(outcomes: Sequence[Outcome]) -> str:
    """How many cases keep their bound, in words."""
    ratios = [(outcome, outcome.ratio) for outcome in outcomes]
    kept = sum(ratio is not None and ratio <= it.case.at_most for it, ratio in ratios)
    behind = [it.case.name for it, ratio in ratios if ratio is not None and ratio > 1]
    missing = sum(ratio is None for _, ratio in ratios)
    parts = [f"{kept} of {len(outcomes)} cases keep their bound"]
    parts += [f"{missing} could not be compared"] if missing else []
    parts += [f"a peer leads in: {'; '.join(behind)}"] if behind else []
    return f"{', '.join(parts)}."


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the table or put it into a page as well."""
    options = _parser().parse_args(arguments)
    config = Config(
        threads=options.threads, log_dir=options.log_dir, cache_dir=cache_directory(None)
    )
    cases = [case for case in CASES if all(word in case.name for word in options.only)]
    if options.models:
        chosen = words(options.models)
        cases = [case for case in cases if case.model.removeprefix("synthetic:") in chosen]
    if options.against:
        peers = tuple(words(options.against))
        cases = [case._replace(peers=peers) for case in cases]
    command = shlex.join(["python", "-m", __spec__.name, *(arguments or sys.argv[1:])])
    text = ""
    for measured in run_cases(cases, config, Progress(), repeat=options.repeat):
        text = said(measured, markdown=bool(options.into))
        if options.into:  # each time: who ends it in the middle keeps what was measured
            pages.write_table(options.into, "bench-acceptance", text, command)
    print(text)


def said(measured: Measured, markdown: bool = False) -> str:
    """The table, how many bounds are kept, and the circumstances."""
    outcomes, reports, notes = measured
    parts = [as_table(outcomes, markdown), summary(outcomes)]
    parts += [result_tables.facts(reports, MEANINGS)] if reports else []
    return "\n\n".join([*parts, *notes])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bertile.studies.acceptance")
    add = parser.add_argument
    add("--only", metavar="WORD", nargs="+", default=[], help="cases that have these in their name")
    add("--models", metavar="NAME", nargs="+", help="cases of one of these models")
    add("--against", metavar="ENGINE", nargs="+", help="these peers instead of each case's own")
    add("--repeat", metavar="N", type=int, default=30, help="measured calls of each engine")
    add("--threads", metavar="N", type=int, default=2, help="cores to use")
    add("--log-dir", metavar="DIR", help="your own tuning logs")
    add(
        "--into",
        metavar="FILE[#NAME]",
        type=pages.argument("bench-acceptance"),
        help="put it at <!-- bench-acceptance --> of a page",
    )
    return parser


if __name__ == "__main__":
    main()
