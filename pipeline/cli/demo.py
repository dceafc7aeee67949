"""Runs `bertile demo`: compiles minilm, compares sentences, times it beside ONNX Runtime."""

from __future__ import annotations

import importlib.util
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bertile.base.progress import Progress
from bertile.base.tables import size, table
from bertile.cli.command import Outcome, dry_run
from bertile.cli.config_flags import FLAGS, MODEL, add_config, read_config

if TYPE_CHECKING:
    import numpy as np

    from bertile.config import Config

SENTENCES = (
    "A man is playing a guitar on the street.",
    "Someone makes music outdoors.",
    "The stock market fell sharply today.",
    "Shares lost much of their value this morning.",
    "She baked a chocolate cake for the party.",
    "The dessert was sweet and came from her oven.",
    "The telescope found a new planet.",
    "Astronomers discovered a distant world.",
)
LENGTHS = (16, 128)


def add_arguments(parser: ArgumentParser) -> None:
    """Where the bundle is written, and every choice of a compile but those of the model."""
    parser.add_argument("-o", "--output", metavar="DIR", default="out/minilm", help="the bundle")
    add_config(parser, *(name for name in FLAGS if FLAGS[name].group != MODEL))


def run(options: Namespace, progress: Progress) -> Outcome:
    """The first thing to try: from a model to a bundle, an answer and a time."""
    config = read_config(options)
    if options.dry_run:
        from bertile import preflight

        options.model = "minilm"
        return dry_run(options, config, preflight.compiling("minilm", options.output, config))
    result = demo(Path(options.output), config, progress)
    return Outcome(result, as_text(result))


def demo(output: Path, config: Config, progress: Progress) -> dict[str, Any]:
    """Compile minilm into `output`, find each sentence's nearest neighbour, time both engines."""
    from bertile import driver, text
    from bertile.bench import benchmark
    from bertile.export import cached

    summary = driver.compile("minilm", output, config, progress)
    with progress.stage("run"), text.open(output, config.threads) as model:
        vectors = model.encode(SENTENCES)
        similar = model.similarity(vectors, vectors)
    onnx = cached.export_cached("minilm", config).onnx_path
    with progress.stage("bench"):
        report = benchmark.bench(
            output, onnx, lengths=LENGTHS, threads=config.threads, progress=progress
        )
    return {
        "compile": summary,
        "neighbours": neighbours(SENTENCES, similar),
        "bench": report,
        "bytes": _sizes(output, onnx),
    }


def neighbours(texts: Sequence[str], cosine: np.ndarray) -> list[dict[str, Any]]:
    """For each text the one most like it, itself left out."""
    import numpy as np

    similar = np.array(cosine)  # to be changed
    np.fill_diagonal(similar, -np.inf)
    nearest = similar.argmax(axis=1)
    return [
        {"text": text, "nearest": texts[index], "cosine": float(similar[row, index])}
        for row, (text, index) in enumerate(zip(texts, nearest))
    ]


def as_text(result: dict[str, Any]) -> str:
    """What `bertile demo` prints: neighbours, then latency and size."""
    pairs = [(entry["text"], entry["nearest"], entry["cosine"]) for entry in result["neighbours"]]
    difference = result["compile"]["max_abs_difference"]
    times = {name: [] for name in result["bench"]["versions"]}
    for row in result["bench"]["rows"]:
        times[row["engine"]].append(row["median_ms"])
    rows = [
        (
            result["bench"]["versions"][name],
            *medians,
            size(result["bytes"][name]["model"]),
            size(result["bytes"][name]["runtime"]),
        )
        for name, medians in times.items()
    ]
    header = ("engine", *(f"ms, {length} tokens" for length in LENGTHS), "model", "runtime")
    return "\n".join(
        [
            table(("sentence", "nearest", "cosine"), pairs),
            "",
            table(header, rows),
            "",
            f"one sentence at a time, {result['bench']['threads']} threads; the outputs differ by "
            f"at most {difference:.1e}; the bundle: {result['compile']['output']}",
        ]
    )


def _sizes(bundle: Path, onnx: Path) -> dict[str, dict[str, int]]:
    from bertile import loader

    ours = sum(os.path.getsize(path) for path in loader.find_runtime())
    spec = importlib.util.find_spec("onnxruntime")
    theirs = _size(Path(spec.origin).parent) if spec and spec.origin else 0
    # runtime/ is counted as runtime, whether or not it lies in the bundle
    extra = _size(bundle / "runtime")
    return {
        "bertile": {"model": _size(bundle) - extra, "runtime": ours},
        "onnxruntime": {"model": _onnx_size(onnx), "runtime": theirs},
    }


def _onnx_size(path: Path) -> int:
    # weights past 2 GB lie beside the file, under its name with an ending
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))


def _size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
