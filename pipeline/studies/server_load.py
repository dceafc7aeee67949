"""Measures `bertile serve` under load, beside plain servers of other engines, in turns.

python -m bertile.studies.server_load load overload idle slow --into pipeline/bench/RESULTS.md

Each measurement is a line of a file as soon as it is there; tables are made of that file.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bertile.base import machine, scratch
from bertile.base.errors import UsageError, require
from bertile.base.progress import Progress
from bertile.bench import pages
from bertile.bench.engines import Engine, LeftOut, Source
from bertile.bench.turns import PAUSE_SECONDS
from bertile.bench.workers import Worker
from bertile.cli.config_flags import cache_directory
from bertile.cli.option_lists import words
from bertile.config import Config
from bertile.evaluation.paragraphs import paragraphs
from bertile.studies import http_load, server_peers, server_tables, text_calls, text_peers
from bertile.studies.http_load import Traffic
from bertile.studies.serving_processes import Server, start_bertile, start_peer

NAME = "bench-server"
THREADS, TEXTS, CLIENTS = 2, 2000, 64
SECONDS, ROUNDS, IDLE_SECONDS = 20.0, 3, 20.0
OVERLOAD, SLOW_CLIENTS, WARM_UP_TEXTS = 4, 200, 256
ROWS = Path("out/server_load.jsonl")


@dataclasses.dataclass(frozen=True)
class Study:
    """What is measured, and with what: `seconds` of each turn."""

    model: str = "minilm"
    precision: str = "int8"
    against: tuple[str, ...] = server_peers.KINDS
    texts: int = TEXTS
    clients: int = CLIENTS
    seconds: float = SECONDS
    rounds: int = ROUNDS
    budget: int | None = None  # tokens that peers run together; Bertile's own where None
    flags: tuple[str, ...] = ()  # for `bertile serve`


class Log:
    """Appends what was measured to a file of JSON lines, each as it comes."""

    def __init__(self, path: Path) -> None:
        self._path, self._run = path, f"{time.time():.0f}"
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, part: str, **row: Any) -> None:
        """A row of that part of this run."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"run": self._run, "part": part, **row}) + "\n")


def rows_of(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of a file by their parts, of each part those of the last run that has some."""
    parts: dict[str, list[dict[str, Any]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows = parts.setdefault(row["part"], [])
        if rows and rows[0]["run"] != row["run"]:
            rows.clear()
        rows.append(row)
    return parts


@dataclasses.dataclass
class Bench:
    """What the parts share: texts as requests, the bundle, what is said to the user, the log."""

    study: Study
    config: Config
    work: Path
    progress: Progress
    log: Log
    corpus: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.corpus = paragraphs(self.study.texts)

    @property
    def threads(self) -> int:
        """Of each engine."""
        return self.config.threads or THREADS

    def prepared(self, kind: str) -> tuple[Engine, Any]:
        """An engine with what it opens, and what opens it; raises LeftOut."""
        self.progress.status(f"server    prepare {kind}")
        source = Source(self.work, model=self.study.model)
        name = f"{kind} {self.study.precision}"
        engine = Engine(name, kind, self.study.precision, source)
        return text_peers.prepared(engine, self.config, self.work, self.progress)

    def bundle(self) -> Path:
        """Compiled at its first use."""
        path = self.work / f"bundle-{self.study.precision}"
        return path if path.is_dir() else self.prepared("bertile")[0].source.bundle

    def requests(self, port: int) -> list[bytes]:
        """One for each text, in their order."""
        bodies = [json.dumps({"inputs": text}).encode() for text in self.corpus]
        return [http_load.post("/embed", body, port) for body in bodies]

    def warm(self, server: Server) -> None:
        """Send it some texts."""
        http_load.once_each(server.port, self.requests(server.port)[:WARM_UP_TEXTS], 8)

    def facts(self, part: str, watch: machine.Watch, **more: Any) -> None:
        """Note on what, and when, a part was measured."""
        self.log.add(
            part,
            facts=True,
            cpu=machine.cpu_name(),
            threads=self.threads,
            time=time.strftime("%Y-%m-%d", time.gmtime()),
            busy=watch.busy(),
            clients=self.study.clients,
            seconds=self.study.seconds,
            rounds=self.study.rounds,
            **more,
        )


def load(bench: Bench) -> None:
    """`encode`, the server and its peers in turns: texts a second, times, cosines to alone."""
    study, notes = bench.study, []
    with contextlib.ExitStack() as stack:
        alone: dict[str, np.ndarray] = {}
        versions: dict[str, str] = {}
        servers: list[Server] = []
        encoder: Worker | None = None
        budget = study.budget
        for kind in ("bertile", *study.against):
            try:
                engine, opener = bench.prepared(kind)
                worker = Worker(engine, bench.threads, opener)
                stack.callback(worker.close)
                versions[engine.name] = worker.receive()
            except LeftOut as reason:
                notes.append(str(reason).rstrip("."))
                continue
            bench.progress.status(f"server    each text alone, {engine.name}")
            alone[engine.name] = worker.apply(text_calls.each_alone, bench.corpus)
            if kind == "bertile":
                encoder = worker
                flags = _budgeted(study, budget)
                server = stack.enter_context(start_bertile(bench.bundle(), *flags))
                budget = budget or int(server.info()["max_batch_tokens"])
            else:
                worker.close()
                assert budget is not None  # Bertile is the first
                server = stack.enter_context(start_peer(engine, bench.threads, budget))
            servers.append(dataclasses.replace(server, name=engine.name))
        assert encoder is not None  # it raises no LeftOut
        for server in servers:
            bench.warm(server)
        watch = machine.Watch([encoder.pid, *(pid for server in servers for pid in server.pids())])
        for turn in range(study.rounds):
            for server in _turned([None, *servers], turn):
                time.sleep(PAUSE_SECONDS)
                if server is None:
                    bench.progress.status(f"server    round {turn + 1}, encode")
                    done = encoder.apply(text_calls.whole_list, bench.corpus)
                    rate = len(bench.corpus) / done.seconds
                    bench.log.add("load", engine="encode", round=turn, texts_per_s=rate)
                    continue
                bench.progress.status(f"server    round {turn + 1}, {server.name}")
                requests = bench.requests(server.port)
                traffic = http_load.closed(server.port, requests, study.clients, study.seconds)
                row = _row(traffic, alone[server.name])
                bench.log.add("load", engine=server.name, round=turn, **row)
        bench.facts("load", watch, versions=versions, notes=notes, budget=budget)


def overload(bench: Bench) -> None:
    """Requests at a multiple of the rate that as many clients get as the server lets in."""
    study = bench.study
    flags = ("--max-concurrent-requests", str(study.clients), *_budgeted(study, study.budget))
    with start_bertile(bench.bundle(), *flags) as server:
        bench.warm(server)
        watch = machine.Watch(server.pids())
        requests = bench.requests(server.port)
        bench.progress.status("server    capacity")
        full = http_load.closed(server.port, requests, study.clients, study.seconds)
        rate = full.statuses()[200] / full.seconds
        held = server.resident_mb()
        bench.progress.status(f"server    {OVERLOAD} times {rate:.0f} requests a second")
        traffic = http_load.open_rate(server.port, requests, OVERLOAD * rate, study.seconds)
        bench.log.add(
            "overload",
            capacity=rate,
            capacity_p99=float(np.percentile(full.milliseconds(), 99)),
            asked=OVERLOAD * rate,
            unsent=traffic.unsent,
            statuses={str(status): count for status, count in traffic.statuses().items()},
            accepted=traffic.statuses()[200] / traffic.seconds,
            p99=float(np.percentile(traffic.milliseconds(), 99)),
            refused_p99=_percentile(traffic.milliseconds(429), 99),
            held_mb=held,
            most_mb=server.resident_mb(most=True),
            limit=study.clients,
        )
        bench.facts("overload", watch)


def idle(bench: Bench) -> None:
    """What a server takes of a core while nobody asks it."""
    with start_bertile(bench.bundle(), *bench.study.flags) as server:
        bench.warm(server)
        time.sleep(2.0)
        watch = machine.Watch(server.pids())
        bench.progress.status("server    idle")
        before, began = server.processor_seconds(), time.perf_counter()
        time.sleep(IDLE_SECONDS)
        share = (server.processor_seconds() - before) / (time.perf_counter() - began)
        bench.log.add("idle", share=share, resident_mb=server.resident_mb())
        bench.facts("idle", watch)


def slow(bench: Bench) -> None:
    """The usual clients alone, and beside clients that send a byte a second."""
    study = bench.study
    with start_bertile(bench.bundle(), *_budgeted(study, study.budget)) as server:
        bench.warm(server)
        watch = machine.Watch(server.pids())
        requests = bench.requests(server.port)
        for count in (0, SLOW_CLIENTS):
            bench.progress.status(f"server    beside {count} slow clients")
            with http_load.slow_clients(server.port, requests[0], count) as fate:
                traffic = http_load.closed(server.port, requests, study.clients, study.seconds)
            bench.log.add("slow", beside=count, fate=dict(fate), **_row(traffic, None))
        bench.facts("slow", watch)


PARTS: dict[str, Callable[[Bench], None]] = {
    "load": load,
    "overload": overload,
    "idle": idle,
    "slow": slow,
}


def _budgeted(study: Study, budget: int | None) -> tuple[str, ...]:
    return (*study.flags, *(("--max-batch-tokens", str(budget)) if budget else ()))


def _turned(contestants: Sequence[Any], turn: int) -> list[Any]:
    first = turn % len(contestants)
    return [*contestants[first:], *contestants[:first]]


def _row(traffic: Traffic, alone: np.ndarray | None) -> dict[str, Any]:
    """What is kept of a load; with the vectors of each text `alone`, cosines to them."""
    statuses, times = traffic.statuses(), traffic.milliseconds()
    row = {
        "texts_per_s": statuses[200] / traffic.seconds,
        "statuses": {str(status): count for status, count in statuses.items()},
        "p50": _percentile(times, 50),
        "p99": _percentile(times, 99),
        "load_us": 1e6 * traffic.processor_seconds / max(1, len(traffic.replies)),
    }
    if alone is not None:
        row |= {"cosine": float(np.min(cosines(traffic, alone), initial=1.0))}
    return row


def cosines(traffic: Traffic, alone: np.ndarray) -> np.ndarray:
    """Of every answer to the vector of its text from a call of its own."""
    (orjson,) = require("serve", "orjson")
    replies = [reply for reply in traffic.replies if reply.status == 200]
    vectors = np.array([orjson.loads(reply.body)[0] for reply in replies], np.float64)
    true = alone[[reply.number for reply in replies]].astype(np.float64)
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(true, axis=1)
    return (vectors * true).sum(axis=1) / np.maximum(lengths, 1e-30)


def _percentile(times: Sequence[float], part: float) -> float | None:
    return float(np.percentile(times, part)) if times else None


@contextlib.contextmanager
def _bench(study: Study, config: Config, rows: Path) -> Iterator[Bench]:
    with scratch.directory("server-") as work:
        yield Bench(study, config, Path(work), Progress(), Log(rows))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the tables of the file's rows or put them into a page as well."""
    options = _parser().parse_args(arguments)
    config = Config(
        threads=options.threads, log_dir=options.log_dir, cache_dir=cache_directory(None)
    )
    against = tuple(words(options.against)) if options.against else server_peers.KINDS
    _must_be_known("engine", against, server_peers.KINDS)
    _must_be_known("part", options.parts, PARTS)
    study = Study(
        options.model,
        options.precision,
        against,
        options.texts,
        options.clients,
        options.seconds,
        options.rounds,
        options.budget,
        tuple(shlex.split(options.flags)),
    )
    if options.parts:
        with _bench(study, config, options.rows) as bench:
            for part in options.parts:
                PARTS[part](bench)
    parts = rows_of(options.rows)
    if options.into:
        command = shlex.join(["python", "-m", __spec__.name, *(arguments or sys.argv[1:])])
        pages.write_table(options.into, NAME, server_tables.said(parts, markdown=True), command)
    print(server_tables.said(parts))


def _must_be_known(what: str, names: Sequence[str], known: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            raise UsageError(f"{what} '{name}' is unknown", f"known: {', '.join(known)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bertile.studies.server_load")
    add = parser.add_argument
    add("parts", metavar="PART", nargs="*", help=f"of {', '.join(PARTS)}")
    add("--model", default="minilm", help="a directory of sentence-transformers (minilm)")
    add("--precision", metavar="P", default="int8", help="int8, fp32")
    kinds = ", ".join(server_peers.KINDS)
    add("--against", metavar="ENGINE", nargs="+", help=f"of {kinds}; all")
    add("--texts", metavar="N", type=int, default=TEXTS, help=f"different ones ({TEXTS})")
    add("--clients", metavar="N", type=int, default=CLIENTS, help=f"at a time ({CLIENTS})")
    add("--seconds", metavar="S", type=float, default=SECONDS, help=f"of a turn ({SECONDS:.0f})")
    add("--rounds", metavar="N", type=int, default=ROUNDS, help=f"of each server ({ROUNDS})")
    add("--budget", metavar="N", type=int, help="tokens that run together; as Bertile chooses")
    add("--flags", metavar="'FLAGS'", default="", help="more of them for `bertile serve`")
    add("--threads", metavar="N", type=int, default=THREADS, help="cores to use")
    add("--log-dir", metavar="DIR", help="your own tuning logs")
    add("--rows", metavar="FILE", type=Path, default=ROWS, help=f"where rows are kept ({ROWS})")
    add(
        "--into",
        metavar="FILE[#NAME]",
        type=pages.argument(NAME),
        help=f"put it at <!-- {NAME} --> of a page",
    )
    return parser


if __name__ == "__main__":
    main()
