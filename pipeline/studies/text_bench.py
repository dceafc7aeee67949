"""Times how libraries make vectors of texts, from texts to vectors, in turns: lists, and queries.

python -m bertile.studies.text_bench --into pipeline/bench/RESULTS.md
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bertile.base import machine, scratch
from bertile.base.errors import BertileError, UsageError
from bertile.base.progress import Progress
from bertile.bench import pages
from bertile.bench.engines import Engine, LeftOut, Source
from bertile.bench.turns import PAUSE_SECONDS
from bertile.bench.workers import Worker
from bertile.cli.config_flags import cache_directory
from bertile.cli.option_lists import words
from bertile.config import Config
from bertile.evaluation.paragraphs import paragraphs
from bertile.studies import text_calls, text_peers, text_tables
from bertile.studies.text_calls import Pass, whole_list

NAME = "bench-texts"
THREADS = 2
TEXTS, QUERIES, SHORT_TEXTS = 2000, 60, 200_000
ROUNDS, QUERY_ROUNDS = 3, 6
FRESH_PROCESSES = 5
REFERENCE = ("st-torch", "fp32")  # whose vectors all others are compared with
PEERS = tuple(kind for kind in text_peers.KINDS if kind != "bertile")


MOST_GROWTH_MB, MOST_FIRST_SECONDS = 50, 0.35
FIRST_VECTOR = """
import sys
import bertile
bertile.open(sys.argv[1], int(sys.argv[2])).encode("What is the capital of France?")
"""
RESIDENT = """
import json, sys
import bertile
from bertile.studies import text_calls
count = int(sys.argv[3])
model = bertile.open(sys.argv[1], int(sys.argv[2]))
marks = (count // 100, count // 10, count)
print(json.dumps(text_calls.resident_mb(model, text_calls.short_texts(count), marks)))
"""


def first_vector_seconds(bundle: Path, threads: int) -> float:
    """From the start of a process to its end behind a first vector: the median of some."""
    times = []
    for _ in range(FRESH_PROCESSES + 1):  # the first brings files into the page cache
        began = time.perf_counter()
        _python(FIRST_VECTOR, bundle, threads)
        times.append(time.perf_counter() - began)
    return float(np.median(times[1:]))


def memory(bundle: Path, threads: int, count: int) -> list[float]:
    """The resident MB of a new process behind 1%, 10% and all of so many short texts."""
    return json.loads(_python(RESIDENT, bundle, threads, count))


def _python(source: str, *arguments: Any) -> str:
    command = [sys.executable, "-c", source, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def measure_lists(
    workers: Sequence[Worker],
    texts: list[str],
    rounds: int,
    progress: Progress,
    passes: dict[str, list[Pass]],
) -> None:
    """Put what comes of each engine's rounds into `passes`, which whoever stops it keeps."""
    for turn in range(rounds):
        for number, worker in enumerate(_turned(workers, turn), 1):
            progress.status(f"texts     round {turn + 1}, engine {number} of {len(workers)}")
            time.sleep(PAUSE_SECONDS)
            passes[worker.name].append(worker.apply(whole_list, texts))


def measure_queries(
    workers: Sequence[Worker],
    queries: list[str],
    rounds: int,
    progress: Progress,
    times: dict[str, list[float]],
) -> None:
    """Put the milliseconds of each engine's calls, of a query each, into `times`."""
    for turn in range(rounds):
        progress.status(f"queries   round {turn + 1} of {rounds}")
        for worker in _turned(workers, turn):
            time.sleep(PAUSE_SECONDS)
            times[worker.name] += worker.apply(text_calls.single_queries, queries)


def _turned(workers: Sequence[Worker], turn: int) -> list[Worker]:
    """The engines so that nobody always works behind the same."""
    first = turn % len(workers)
    return [*workers[first:], *workers[:first]]


def run(
    model: str,
    config: Config,
    progress: Progress,
    *,
    precisions: Sequence[str],
    against: Sequence[str],
    texts: int = TEXTS,
    rounds: int = ROUNDS,
    parts: Sequence[str] = (),
) -> dict[str, Any]:
    """A report: "rows" of engines as `text_tables.row_of` gives them, "versions", "notes", and the
    circumstances; of `parts` ("memory", "startup") a sentence each on the first precision's bundle.
    """
    threads = config.threads or THREADS
    wanted = [("bertile", precision) for precision in precisions]
    wanted += [(kind, precision) for kind in against for precision in precisions]
    with scratch.directory("texts-") as work, contextlib.ExitStack() as stack:
        source = Source(Path(work), model=model)
        engines = [
            Engine(f"{kind} {precision}", kind, precision, source)
            for kind, precision in dict.fromkeys([*wanted, REFERENCE])
        ]
        workers, versions, notes = _started(engines, config, stack, progress)
        bundle = workers[0].engine.source.bundle
        corpus, counts = _corpus(bundle, texts)
        queries = [text for text, n in zip(corpus, counts) if n in text_tables.QUERY_TOKENS][
            :QUERIES
        ]
        torch = next((worker for worker in workers if worker.name == " ".join(REFERENCE)), None)
        if torch is None:
            raise BertileError("nothing gives the vectors to compare with", "; ".join(notes))
        progress.status(f"texts     the vectors of {torch.name}")
        true = torch.apply(whole_list, corpus).vectors
        measured = [worker for worker in workers if worker is not torch or REFERENCE in wanted]
        watch = machine.Watch([worker.pid for worker in measured])
        passes: dict[str, list[Pass]] = {worker.name: [] for worker in measured}
        times: dict[str, list[float]] = {worker.name: [] for worker in measured}
        busy = None
        try:
            measure_lists(measured, corpus, rounds, progress, passes)
            measure_queries(measured, queries, QUERY_ROUNDS, progress, times)
            busy = watch.busy()  # parts have processes of their own
            sentences = []
            for part in parts:
                progress.status(f"texts     {part}, which takes some minutes")
                sentences.append(PARTS[part](bundle, threads))
        except KeyboardInterrupt:  # what was measured is worth a table
            sentences = ["Stopped by Ctrl-C: not every round was measured."]
        busy = busy or watch.busy()
        rows = [
            text_tables.row_of(worker.engine, passes[worker.name], times[worker.name], true)
            for worker in measured
            if passes[worker.name]
        ]
        if not rows:
            raise KeyboardInterrupt
    return {
        "rows": rows,
        "versions": versions,
        "notes": notes,
        "texts": len(corpus),
        "lengths": counts,
        "queries": len(times[rows[0]["engine"]]),
        "rounds": len(passes[rows[0]["engine"]]),
        "threads": threads,
        "busy": busy,
        "cpu": machine.cpu_name(),
        "time": time.strftime("%Y-%m-%d", time.gmtime()),
        "parts": sentences,
    }


def _started(
    engines: Iterable[Engine], config: Config, stack: contextlib.ExitStack, progress: Progress
) -> tuple[list[Worker], dict[str, str], list[str]]:
    """The engines' workers, which `stack` ends, with their versions by name, and a sentence on each
    that cannot be had. What an engine opens is made in the directory that its source names.
    """
    workers: list[Worker] = []
    notes: list[str] = []
    for engine in engines:
        progress.status(f"texts     prepare {engine.name}")
        try:
            ready, opener = text_peers.prepared(engine, config, engine.source.bundle, progress)
        except LeftOut as reason:
            notes.append(str(reason).rstrip("."))
            continue
        workers.append(Worker(ready, config.threads or THREADS, opener))
        stack.callback(workers[-1].close)
    versions = {}
    for worker in list(workers):  # which have begun to open meanwhile
        progress.status(f"texts     open {worker.name}")
        try:
            versions[worker.name] = worker.receive()
        except LeftOut as reason:
            notes.append(str(reason).rstrip("."))
            workers.remove(worker)
    return workers, versions, notes


def _memory_said(bundle: Path, threads: int) -> str:
    early, tenth, end = memory(bundle, threads, SHORT_TEXTS)
    return (
        f"{SHORT_TEXTS} texts of a few words through the iterator: {early:.0f} MB resident behind"
        f" 1% of them, {tenth:.0f} behind 10%, {end:.0f} at the end (asked: within"
        f" {MOST_GROWTH_MB} MB)."
    )


def _startup_said(bundle: Path, threads: int) -> str:
    seconds = first_vector_seconds(bundle, threads)
    return (
        f"A new process gives its first vector and has ended after {seconds:.2f} s (asked:"
        f" {MOST_FIRST_SECONDS}), median of {FRESH_PROCESSES}, files in the page cache."
    )


PARTS = {"memory": _memory_said, "startup": _startup_said}


def _corpus(bundle: Path, count: int) -> tuple[list[str], list[int]]:
    """The texts, and the tokens of each, as the model cuts it."""
    import bertile

    texts = paragraphs(count)
    with bertile.open(bundle, 1) as model:
        tokenizer = model.tokenizer
        counts = [len(encoding) for encoding in tokenizer.encode_batch_fast(texts)]
        longest = model.max_seq_length or max(counts)
    return texts, [min(length, longest) for length in counts]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the tables or put them into a page as well."""
    options = _parser().parse_args(arguments)
    config = Config(
        threads=options.threads, log_dir=options.log_dir, cache_dir=cache_directory(None)
    )
    precisions = tuple(words(options.precision)) if options.precision else usual_precisions()
    against = tuple(words(options.against)) if options.against else PEERS
    for kind in against:
        if kind not in PEERS:
            raise UsageError(f"engine '{kind}' is unknown", f"known: {', '.join(PEERS)}")
    report = run(
        options.model,
        config,
        Progress(),
        precisions=precisions,
        against=against,
        texts=options.texts,
        rounds=options.rounds,
        parts=[part for part in PARTS if getattr(options, part)],
    )
    if options.into:
        command = shlex.join(["python", "-m", __spec__.name, *(arguments or sys.argv[1:])])
        pages.write_table(options.into, NAME, text_tables.said(report, markdown=True), command)
    print(text_tables.said(report))


def usual_precisions() -> tuple[str, ...]:
    """Those that this machine has instructions for."""
    from bertile.targets import rows

    return ("fp32", "bf16", "int8") if rows.native().bf16 else ("fp32", "int8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bertile.studies.text_bench")
    add = parser.add_argument
    add("--model", default="minilm", help="a directory of sentence-transformers (minilm)")
    add("--precision", metavar="P", nargs="+", help="fp32, bf16, int8; what the machine has")
    add("--against", metavar="ENGINE", nargs="+", help=f"of {', '.join(PEERS)}; all")
    add("--texts", metavar="N", type=int, default=TEXTS, help=f"how many ({TEXTS})")
    add("--rounds", metavar="N", type=int, default=ROUNDS, help=f"of each engine ({ROUNDS})")
    add("--memory", action="store_true", help="what 200,000 texts take")
    add("--startup", action="store_true", help="when a new process has its first vector")
    add("--threads", metavar="N", type=int, default=THREADS, help="cores to use")
    add("--log-dir", metavar="DIR", help="your own tuning logs")
    add(
        "--into",
        metavar="FILE[#NAME]",
        type=pages.argument(NAME),
        help=f"put it at <!-- {NAME} --> of a page",
    )
    return parser


if __name__ == "__main__":
    main()
