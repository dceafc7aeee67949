"""Draws a synthetic model's time against the sparsity of its weights, beside that of dense kernels
and of other engines on the same weights.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from bertile import driver, loader
from bertile.base import scratch
from bertile.base.progress import Progress
from bertile.bench import competitors, turns
from bertile.bench.engines import Engine, Source
from bertile.config import Config
from bertile.run import requests
from bertile.studies.plot import Line, Panel, svg

DENSE, SPARSE = "dense kernels", "sparse kernels"


@dataclass(frozen=True)
class Row:
    """Milliseconds of one engine on weights of which a share is zero, in a pattern."""

    precision: str
    pattern: str
    sparsity: float
    engine: str
    median_ms: float
    p90_ms: float


@dataclass(frozen=True)
class Series:
    """What is measured in one go: every engine's calls are taken in turns."""

    precision: str
    pattern: str
    points: Sequence[float]
    peer_points: Sequence[float] = ()
    against: Sequence[str] = ()


def measure(
    model: str, series: Series, config: Config, length: int, repeat: int, progress: Progress
) -> list[Row]:
    """A row for each point with every layer on the sparse kernel, for the dense kernels at the
    first point, since zeros make no difference to them, and for each engine at its points.

    `model` is a name of ``synthetic``; `config` says the rest of how it is compiled.
    """
    config = dataclasses.replace(config, precision=series.precision)
    threads = config.threads or loader.available_cores()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(scratch.directory("curve-")))
        engines = dict(_engines(model, series, config, directory, progress))
        manifest = loader.read_manifest(directory / "dense")
        inputs = requests.random_inputs(manifest, 1, length)
        workers, versions, notes = stack.enter_context(
            turns.started([*engines.values()], inputs, threads, config.cache_dir)
        )
        for note in notes:
            progress.say(note)
        rows = turns.measure(workers, inputs, repeat, progress)
    names = {engine.name: key for key, engine in engines.items()}
    curve = []
    for row in rows:
        sparsity, kind = names[row["engine"]]
        name = kind if kind in (DENSE, SPARSE) else versions[row["engine"]]
        times = (row["median_ms"], row["p90_ms"])
        curve.append(Row(series.precision, series.pattern, sparsity, name, *times))
    return curve


def crossover(rows: Sequence[Row]) -> float | None:
    """The least sparsity from which on the sparse kernels of one series are faster than its dense
    ones, between two points on a straight line; None where they never are.
    """
    dense = next(row.median_ms for row in rows if row.engine == DENSE)
    points = sorted((row.sparsity, row.median_ms) for row in rows if row.engine == SPARSE)
    slower = [place for place, (_, time) in enumerate(points) if time >= dense]
    if not slower:
        return points[0][0]
    last = slower[-1]
    if last + 1 == len(points):
        return None
    (low, before), (high, after) = points[last : last + 2]
    return low + (high - low) * (before - dense) / (before - after)


def as_csv(rows: Sequence[Row]) -> str:
    """The rows with full precision."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(Row)])
    writer.writeheader()
    writer.writerows(map(dataclasses.asdict, rows))
    return text.getvalue().replace("\r\n", "\n")


def as_svg(rows: Sequence[Row], title: str) -> str:
    """A panel for each precision: our patterns, the dense kernels, and the other engines."""
    precisions = dict.fromkeys(row.precision for row in rows)
    panels = []
    for precision in precisions:
        ours = [row for row in rows if row.precision == precision]
        several = len({row.pattern for row in ours}) > 1
        highest = max(100 * row.sparsity for row in ours)
        dense = [row.median_ms for row in ours if row.engine == DENSE]
        level = sum(dense) / len(dense)
        lines = [Line(f"Bertile, {DENSE}", ((0.0, level), (highest, level)), level=True)]
        for engine, pattern in dict.fromkeys((row.engine, row.pattern) for row in ours):
            if engine == DENSE:
                continue
            name = "Bertile" if engine == SPARSE else engine
            points = tuple(
                (100 * row.sparsity, row.median_ms)
                for row in ours
                if (row.engine, row.pattern) == (engine, pattern)
            )
            shown = f"{name}, {pattern}" if several or engine == SPARSE else name
            lines.append(Line(shown, points))
        panels.append(
            Panel(f"{precision}, {title}", tuple(lines), "% of the weights that are zero", "ms")
        )
    return svg(panels)


def named(model: str, sparsity: float, pattern: str) -> str:
    """The synthetic model with that share of zeros."""
    return f"synthetic:{model}@{sparsity:g}:{pattern}" if sparsity else f"synthetic:{model}"


def _engines(
    model: str, series: Series, config: Config, parent: Path, progress: Progress
) -> Iterator[tuple[tuple[float, str], Engine]]:
    """Engines by sparsity and kind, each with a name of its own."""

    def compiled(name: str, sparsity: float, sparse: str) -> Engine:
        asked = dataclasses.replace(config, sparse=sparse)
        source = named(model, sparsity, series.pattern)
        driver.compile(source, parent / name, asked, progress)
        return Engine(name, "bertile", series.precision, Source(parent / name))

    first = series.points[0]
    yield (first, DENSE), compiled("dense", first, "off")
    for sparsity in series.points:
        yield (sparsity, SPARSE), compiled(f"sparse-{sparsity:g}", sparsity, "always")
    for sparsity in series.peer_points:
        directory = parent / f"sparse-{sparsity:g}"
        manifest = loader.read_manifest(directory)
        peers, notes = competitors.engines(
            directory, manifest, series.against, None, config.cache_dir, progress
        )
        for note in notes:
            progress.say(note)
        for peer in peers[1:]:
            yield (sparsity, peer.name), dataclasses.replace(peer, name=f"{peer.name} {sparsity:g}")
