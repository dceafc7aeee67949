"""Measures what compressed models are worth and what they cost, all in one run, beside ONNX Runtime
and OpenVINO on the same weights.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bertile import driver, loader
from bertile.base import directories, machine
from bertile.base.errors import PlatformError, UsageError
from bertile.base.progress import Progress
from bertile.bench import competitors, energy, instructions, turns
from bertile.bench.engines import Arrays, Engine
from bertile.bench.instructions import Counter
from bertile.config import Config
from bertile.evaluation import datasets
from bertile.evaluation.datasets import Dataset
from bertile.export.learned_ranges import REPORT
from bertile.numerics.precision import PRECISIONS
from bertile.report import frontier_page, frontier_scores, frontier_times
from bertile.report.frontier_scores import Answers
from bertile.report.frontier_times import Times
from bertile.run.requests import random_inputs
from bertile.targets import rows as targets
from bertile.tune.measure import roofline

NOT_COUNTED = "instructions are not counted: ask for it with --instructions"
AGAINST = ("onnxruntime", "openvino")
MARKER = "pareto.json"
PAGE, TABLE, PICTURE = "pareto.html", "pareto.csv", "pareto.svg"
ENERGY_SECONDS = 3.0  # of calls, that a gauge of coarse steps can tell


@dataclass(frozen=True)
class Point:
    """A trained model, the precision that it is compiled in, and how sure a text must be that
    leaves early, None without early heads; `name` as the page shows it.
    """

    name: str
    model: str
    precision: str = "fp32"
    exit_threshold: float | None = None


def parse(text: str) -> Point:
    """Read [NAME=]MODEL[@PRECISION][:THRESHOLD], as out/p90@int8, or out/early@int8:0.9."""
    name, equals, rest = text.rpartition("=")
    rest, threshold = _split_threshold(rest)
    model, precision = split_precision(rest)
    if not model:
        raise UsageError(f"'{text}' names no model", "write it like out/small@int8")
    precision = precision or "fp32"
    leaves = "" if threshold is None else f", exit at {threshold:g}"
    label = name if equals else f"{Path(model).name} {precision}{leaves}"
    return Point(label, model, precision, threshold)


def _split_threshold(text: str) -> tuple[str, float | None]:
    before, colon, number = text.rpartition(":")
    plain = colon and number.replace(".", "", 1).isdecimal()
    return (before, float(number)) if plain else (text, None)


def split_precision(text: str) -> tuple[str, str | None]:
    """A name, and the precision behind the last @; None where there is none."""
    name, at, precision = text.rpartition("@")
    return (name, precision) if at and precision in PRECISIONS else (text, None)


def write(
    points: Sequence[Point],
    data: str | Path,
    output: str | Path,
    config: Config,
    progress: Progress,
    against: Sequence[str] = AGAINST,
    length: int = 128,
    repeat: int = 30,
    reference: str | None = None,
    count: bool = False,
) -> dict[str, Any]:
    """Compile the points, measure all engines in turns, and write a page, its picture and a CSV to
    `output`.

    Accuracy is of the texts of `data`, as `datasets.read` takes them; where they have no labels,
    answers are compared with those of the model `reference` (default: the first point) in float32,
    by ONNX Runtime. Latency is the median of a call of one text of `length` tokens;
    its instructions are counted where `count` asks for it.
    """
    directories.check(output, MARKER)
    row = targets.resolve(config.target, config.threads)
    if not targets.fits(row, loader.cpu_features()):
        raise PlatformError(
            f"a bundle for {row.name} cannot be timed here", "leave --target out, or run it there"
        )
    dataset = datasets.read(Path(data))
    if len({point.name for point in points}) < len(points):
        raise UsageError("two points have the same name", "give names: NAME=MODEL@PRECISION")
    threads = config.threads or loader.available_cores()
    with directories.making(output, MARKER) as directory:
        bundles = _compiled(points, config, directory / "bundles", progress)
        engines, notes = _engines(points, bundles, against, config, progress)
        rows, versions, more = _measured(
            engines, bundles, dataset, threads, length, repeat, config, progress, reference, count
        )
        content = {
            "rows": rows,
            "data": str(data),
            "texts": len(dataset.texts),
            "metric": "accuracy" if dataset.labels else "spearman",
            "length": length,
            "threads": threads,
            "cpu": machine.cpu_name(),
            "versions": versions,
            "notes": [*notes, *more],
            "time": time.strftime("%Y-%m-%d", time.gmtime()),
        }
        (directory / PAGE).write_text(frontier_page.html(content), encoding="utf-8")
        (directory / PICTURE).write_text(frontier_page.svg(content), encoding="utf-8")
        (directory / TABLE).write_text(as_csv(rows), encoding="utf-8", newline="")
        content = directories.mark(directory, MARKER, content)
    return {**content, "output": str(output)}


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every number of the table."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]), restval="")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def command(point: Point) -> str:
    """The lines of a shell that make a point again, as far as its model, and those that it was made
    of and taught by, say how they were made.
    """
    lines = list(dict.fromkeys(_trainings(point.model)))
    words = ["bertile", "compile", point.model, "-o", "BUNDLE", "--precision", point.precision]
    if point.exit_threshold is not None:
        words += ["--exit-threshold", f"{point.exit_threshold:g}"]
    return "\n".join([*lines, shlex.join(words)])


def _trainings(model: str) -> Iterator[str]:
    """The commands that train a model, those before that it needs first."""
    report = Path(model) / REPORT
    if not report.is_file():
        return
    content = json.loads(report.read_text(encoding="utf-8"))
    words = ["bertile", "compress", content["model"], "-o", model, "--task", content["task"]]
    words += ["--data", content["data"]["train"]]
    if content["data"]["eval"]:
        words += ["--eval", content["data"]["eval"]]
    for name in content["data"]["unlabelled"]:
        words += ["--unlabelled", name]
    yield from _trainings(content["model"])
    if content["teacher"] and content["teacher"] != content["model"]:
        yield from _trainings(content["teacher"])
        words += ["--teacher", content["teacher"]]
    for section, values in content["recipe"].items():
        for key, value in values.items():
            if value is not None:
                words += ["--set", f"{section}.{key}={json.dumps(value)}"]
    yield shlex.join(words)


def _compiled(
    points: Sequence[Point], config: Config, directory: Path, progress: Progress
) -> dict[str, Path]:
    bundles = {}
    for number, point in enumerate(points, 1):
        progress.say(f"{number} of {len(points)}: compile {point.name}")
        bundles[point.name] = directory / str(number)
        asked = dataclasses.replace(
            config, precision=point.precision, exit_threshold=point.exit_threshold
        )
        driver.compile(point.model, bundles[point.name], asked, progress)
    return bundles


def _engines(
    points: Sequence[Point],
    bundles: Mapping[str, Path],
    against: Sequence[str],
    config: Config,
    progress: Progress,
) -> tuple[list[tuple[Point, Engine]], list[str]]:
    """Bertile and its peers of every point, each under a name of its own."""
    engines, notes = [], []
    for point in points:
        bundle = bundles[point.name]
        manifest = loader.read_manifest(bundle)
        others = against if point.exit_threshold is None else ()  # no other lets texts leave
        peers, more = competitors.engines(
            bundle, manifest, others, None, config.cache_dir, progress
        )
        notes += [f"{point.name}: {note}" for note in more]
        for engine in peers:
            named = dataclasses.replace(engine, name=f"{point.name} / {engine.kind}")
            engines.append((point, named))
    return engines, notes


def _measured(
    engines: Sequence[tuple[Point, Engine]],
    bundles: Mapping[str, Path],
    dataset: Dataset,
    threads: int,
    length: int,
    repeat: int,
    config: Config,
    progress: Progress,
    reference: str | None,
    count: bool,
) -> tuple[list[dict[str, Any]], dict[str, str], list[str]]:
    first = next(iter(bundles.values()))
    inputs = random_inputs(loader.read_manifest(first), 1, length)
    points = {engine.name: (point, engine) for point, engine in engines}
    started = turns.started([engine for _, engine in engines], inputs, threads, config.cache_dir)
    with started as (workers, versions, notes):
        manifests = {name: loader.read_manifest(bundle) for name, bundle in bundles.items()}
        exits = {w.name: manifests[points[w.name][0].name].get("exits") for w in workers}
        stages = {name: len(each["stages"]) if each else 1 for name, each in exits.items()}
        times = frontier_times.measure(workers, inputs, repeat, stages, progress)
        joules, said = _joules(workers, inputs, times)
        answers = {}
        for number, worker in enumerate(workers, 1):
            progress.status(f"pareto    accuracy, engine {number} of {len(workers)}")
            point, _ = points[worker.name]
            answers[worker.name] = frontier_scores.answers_of(worker, bundles[point.name], dataset)
    wanted = _reference(answers, points, reference) if dataset.labels is None else None
    rows = []
    counter = instructions.counter() if count else None
    for name, milliseconds in times.items():
        point, engine = points[name]
        left = frontier_scores.left_at(answers[name].layers, exits[name])
        row = {
            "model": point.name,
            "engine": engine.kind,
            "precision": engine.precision,
            **frontier_times.of_texts(milliseconds, left),
            "left": frontier_scores.in_words(left, exits[name]),
            **frontier_scores.score(answers[name].outputs, dataset, bundles[point.name], wanted),
            "joules": joules.get(name),
            **_work(bundles[point.name], engine.kind, length, left, counter),
            "command": command(point),
        }
        rows.append(row)
    shown = {name.rpartition(" / ")[2]: version for name, version in versions.items()}
    counted = f"instructions are counted by {counter.name}" if counter else NOT_COUNTED
    if count and counter is None:
        counted = instructions.why_not()
    missing = [r["model"] for r in rows if r["engine"] == "bertile" and r["instructions"] is None]
    if counter is not None and missing:
        counted += f", but for {', '.join(missing)}: {instructions.WHY_NOT_THESE}"
    return rows, shown, [*notes, *said, counted]


def _reference(
    answers: Mapping[str, Answers],
    points: Mapping[str, tuple[Point, Engine]],
    reference: str | None,
) -> np.ndarray:
    """The answers that others are compared with, where there are no labels."""
    for name, (point, engine) in points.items():
        asked = reference in (None, point.name)
        if name in answers and asked and engine.precision == "fp32":
            return answers[name].outputs
    raise UsageError(
        "there is no point in fp32 to compare answers with",
        "give the teacher as a point, MODEL@fp32",
    )


def _joules(
    workers: Sequence[Any], inputs: Arrays, times: Mapping[str, Times]
) -> tuple[dict[str, float], list[str]]:
    """Joules of a text by engine; or why nobody knows."""
    gauge = energy.gauge()
    if gauge is None:
        return {}, [energy.why_not()]
    spent = {}
    for worker in workers:
        calls = max(1, round(ENERGY_SECONDS / (np.median(times[worker.name][-1]) / 1e3)))
        gauge.joules()
        worker.call(inputs, calls)
        spent[worker.name] = gauge.joules() / calls
    return spent, [f"joules are the whole machine's, by {gauge.name}"]


def _work(
    bundle: Path, kind: str, length: int, left: np.ndarray, counter: Counter | None
) -> dict[str, float | None]:
    """What a text asks of Bertile: multiply-adds, bytes of weights, tables left out, instructions.

    Of a model with early heads: bytes by the share `left` of the texts at each stage, and no more.
    """
    work: dict[str, float | None] = dict.fromkeys(("multiply_adds", "weight_bytes", "instructions"))
    if kind != "bertile":
        return work
    manifest = loader.read_manifest(bundle)
    if exits := manifest.get("exits"):
        names: set[str] = set()
        read = []
        for stage in exits["stages"]:
            names |= {manifest["params"][place] for place in stage["params"]}
            read.append(energy.weight_bytes(bundle, names))
        return {**work, "weight_bytes": float(np.dot(left, read))}
    return {
        "multiply_adds": roofline.request_flops(manifest["kernels"], 1, length) / 2,
        "weight_bytes": energy.weight_bytes(bundle),
        "instructions": instructions.of_text(bundle, length, counter) if counter else None,
    }
