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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bertile import driver, loader
from bertile.base import directories, machine
from bertile.base.errors import UsageError
from bertile.base.progress import Progress
from bertile.bench import competitors, energy, turns
from bertile.bench.engines import Arrays, Engine
from bertile.config import Config
from bertile.evaluation import datasets, metrics
from bertile.evaluation.datasets import Dataset
from bertile.export.learned_ranges import REPORT
from bertile.families import text_settings
from bertile.numerics.precision import PRECISIONS
from bertile.report import frontier_page
from bertile.run.requests import random_inputs
from bertile.text.tokens import FIELDS, TextTokenizer, max_tokens
from bertile.tune.measure import roofline

AGAINST = ("onnxruntime", "openvino")
MARKER = "pareto.json"
PAGE, TABLE = "pareto.html", "pareto.csv"
RESAMPLES, CONFIDENCE, SEED = 2000, 0.95, 20
ENERGY_SECONDS = 3.0  # of calls, that a gauge of coarse steps can tell


@dataclass(frozen=True)
class Point:
    """A trained model, and the precision that it is compiled in; `name` as the page shows it."""

    name: str
    model: str
    precision: str = "fp32"


def parse(text: str) -> Point:
    """Read [NAME=]MODEL[@PRECISION], as out/p90@int8."""
    name, equals, rest = text.rpartition("=")
    model, precision = split_precision(rest)
    if not model:
        raise UsageError(f"'{text}' names no model", "write it like out/small@int8")
    precision = precision or "fp32"
    label = name if equals else f"{Path(model).name} {precision}"
    return Point(label, model, precision)


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
) -> dict[str, Any]:
    """Compile the points, measure all engines in turns, and write a page and a CSV to `output`.

    Accuracy is of the texts of `data`, as `datasets.read` takes them; where they have no labels,
    answers are compared with those of the model `reference` (default: the first point) in float32,
    by ONNX Runtime. Latency is the median of a call of one text of `length` tokens.
    """
    directories.check(output, MARKER)
    dataset = datasets.read(Path(data))
    if len({point.name for point in points}) < len(points):
        raise UsageError("two points have the same name", "give names: NAME=MODEL@PRECISION")
    threads = config.threads or loader.available_cores()
    with directories.making(output, MARKER) as directory:
        bundles = _compiled(points, config, directory / "bundles", progress)
        engines, notes = _engines(points, bundles, against, config, progress)
        rows, versions, more = _measured(
            engines, bundles, dataset, threads, length, repeat, config, progress, reference
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


def bootstrap(right: np.ndarray, resamples: int = RESAMPLES) -> tuple[float, float]:
    """The ends of the interval that holds the mean of (texts,) with 95% confidence.

    Efron 1979: means of as many texts, drawn again and again from these.
    """
    chance = np.random.default_rng(SEED)
    draws = chance.integers(0, len(right), (resamples, len(right)))
    means = right[draws].mean(1)
    tail = (1 - CONFIDENCE) / 2
    return float(np.quantile(means, tail)), float(np.quantile(means, 1 - tail))


def command(point: Point) -> str:
    """The lines of a shell that make a point again, as far as its model says how it was made."""
    lines = []
    report = Path(point.model) / REPORT
    if report.is_file():
        content = json.loads(report.read_text(encoding="utf-8"))
        words = ["bertile", "compress", content["model"], "-o", point.model]
        words += ["--task", content["task"]]
        words += ["--data", content["data"]["train"]]
        if content["data"]["eval"]:
            words += ["--eval", content["data"]["eval"]]
        for name in content["data"]["unlabelled"]:
            words += ["--unlabelled", name]
        if content["teacher"] and content["teacher"] != content["model"]:
            words += ["--teacher", content["teacher"]]
        for section, values in content["recipe"].items():
            for key, value in values.items():
                if value is not None:
                    words += ["--set", f"{section}.{key}={json.dumps(value)}"]
        lines.append(shlex.join(words))
    words = ["bertile", "compile", point.model, "-o", "BUNDLE", "--precision", point.precision]
    return "\n".join([*lines, shlex.join(words)])


def _compiled(
    points: Sequence[Point], config: Config, directory: Path, progress: Progress
) -> dict[str, Path]:
    bundles = {}
    for number, point in enumerate(points, 1):
        progress.say(f"{number} of {len(points)}: compile {point.name}")
        bundles[point.name] = directory / str(number)
        asked = dataclasses.replace(config, precision=point.precision)
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
        peers, more = competitors.engines(
            bundle, manifest, against, None, config.cache_dir, progress
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
) -> tuple[list[dict[str, Any]], dict[str, str], list[str]]:
    first = next(iter(bundles.values()))
    inputs = random_inputs(loader.read_manifest(first), 1, length)
    points = {engine.name: (point, engine) for point, engine in engines}
    started = turns.started([engine for _, engine in engines], inputs, threads, config.cache_dir)
    with started as (workers, versions, notes):
        times: dict[str, list[float]] = {worker.name: [] for worker in workers}
        for turn, done in enumerate(range(0, repeat, turns.TURN)):
            progress.status(f"pareto    latency, call {done} of {repeat}")
            place = turn % len(workers)
            for worker in (*workers[place:], *workers[:place]):
                time.sleep(turns.PAUSE_SECONDS)
                times[worker.name] += worker.call(inputs, min(turns.TURN, repeat - done))
        joules, said = _joules(workers, inputs, times)
        answers = {}
        for number, worker in enumerate(workers, 1):
            progress.status(f"pareto    accuracy, engine {number} of {len(workers)}")
            point, _ = points[worker.name]
            answers[worker.name] = _answers(worker, bundles[point.name], dataset)
    wanted = _reference(answers, points, reference)
    rows = []
    for name, milliseconds in times.items():
        point, engine = points[name]
        row = {
            "model": point.name,
            "engine": engine.kind,
            "precision": engine.precision,
            "median_ms": float(np.median(milliseconds)),
            "p90_ms": float(np.quantile(milliseconds, 0.9)),
            **_score(answers[name], dataset, bundles[point.name], wanted),
            "joules": joules.get(name),
            **_work(bundles[point.name], engine.kind, length),
            "command": command(point),
        }
        rows.append(row)
    shown = {name.rpartition(" / ")[2]: version for name, version in versions.items()}
    return rows, shown, [*notes, *said]


def _answers(worker: Any, bundle: Path, dataset: Dataset) -> np.ndarray:
    """What an engine answers to each text by itself, (texts, channels)."""
    manifest = loader.read_manifest(bundle)
    output = datasets.output_of(manifest["model"]["head"], dataset)
    place = [spec["name"] for spec in manifest["outputs"]].index(output)
    settings = text_settings.of_bundle(bundle, manifest)
    tokenizer = TextTokenizer(bundle, settings, max_tokens(manifest))
    names = [spec["name"] for spec in manifest["inputs"] if spec["name"] in FIELDS]
    rows = []
    for encoding in tokenizer.encode(dataset.texts):
        arrays: Arrays = {
            name: np.array([getattr(encoding, FIELDS[name])], np.int64) for name in names
        }
        rows.append(worker.outputs(arrays)[place][0])
    return np.stack(rows)


def _reference(
    answers: Mapping[str, np.ndarray],
    points: Mapping[str, tuple[Point, Engine]],
    reference: str | None,
) -> np.ndarray:
    """The answers that others are compared with, where there are no labels."""
    for name, (point, engine) in points.items():
        asked = reference in (None, point.name)
        if name in answers and asked and engine.precision == "fp32":
            return answers[name]
    raise UsageError(
        "there is no point in fp32 to compare answers with",
        "give the teacher as a point, MODEL@fp32",
    )


def _score(
    answers: np.ndarray, dataset: Dataset, bundle: Path, wanted: np.ndarray
) -> dict[str, float]:
    """ "score" with the ends of its interval, "low" and "high"."""
    if dataset.labels is None:
        score = metrics.similarity_spearman(answers, wanted)
        low, high = _bootstrap_of_pairs(answers, wanted)
        return {"score": score, "low": low, "high": high}
    names = loader.read_manifest(bundle)["model"]["labels"]
    right = np.array(
        [names[best] == label for best, label in zip(answers.argmax(1), dataset.labels)], float
    )
    low, high = bootstrap(right)
    return {"score": float(right.mean()), "low": low, "high": high}


def _bootstrap_of_pairs(answers: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """The same of a correlation over pairs, of texts that are drawn again; a tenth of the draws,
    since each sorts all pairs.
    """
    chance = np.random.default_rng(SEED)
    scores = []
    for _ in range(RESAMPLES // 10):
        drawn = np.unique(chance.integers(0, len(answers), len(answers)))
        scores.append(metrics.similarity_spearman(answers[drawn], wanted[drawn]))
    tail = (1 - CONFIDENCE) / 2
    return float(np.quantile(scores, tail)), float(np.quantile(scores, 1 - tail))


def _joules(
    workers: Sequence[Any], inputs: Arrays, times: Mapping[str, Sequence[float]]
) -> tuple[dict[str, float], list[str]]:
    """Joules of a text by engine; or why nobody knows."""
    gauge = energy.gauge()
    if gauge is None:
        return {}, [energy.why_not()]
    spent = {}
    for worker in workers:
        calls = max(1, round(ENERGY_SECONDS / (np.median(times[worker.name]) / 1e3)))
        gauge.joules()
        worker.call(inputs, calls)
        spent[worker.name] = gauge.joules() / calls
    return spent, [f"joules are the whole machine's, by {gauge.name}"]


def _work(bundle: Path, kind: str, length: int) -> dict[str, float | None]:
    """What a text asks of Bertile: multiply-adds, and bytes of weights, tables left out."""
    if kind != "bertile":
        return {"multiply_adds": None, "weight_bytes": None}
    kernels = loader.read_manifest(bundle)["kernels"]
    return {
        "multiply_adds": roofline.request_flops(kernels, 1, length) / 2,
        "weight_bytes": energy.weight_bytes(bundle),
    }
