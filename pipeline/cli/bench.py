"""Runs `bertile bench`: times bundles or models and their peers in turn on the same inputs."""

from __future__ import annotations

import shlex
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from bertile.base.progress import Progress
from bertile.cli.command import Outcome
from bertile.cli.config_flags import add_some_config, read_config

CONFIG = ("threads", "precision", "sparse", "log-dir", "shipped-log", "cache-dir")
PEERS = (
    "onnxruntime (default), openvino, torch, deepsparse, each in the bundle's precision, or in"
    " another as openvino:bf16; another bundle's directory; or none; with blanks or commas between"
)
INTO = (
    "put the tables into a page, at <!-- bench -->, <!-- bench-PRECISION --> or <!-- NAME -->"
    " (--update-readme is its old name)"
)


def add_arguments(parser: ArgumentParser) -> None:
    """The flags that are the benchmark's own, and those of CONFIG."""
    add = parser.add_argument
    add("targets", metavar="BUNDLE|MODEL", nargs="+", help="a model is compiled first")
    add(
        "--onnx",
        metavar="FILE",
        help="the ONNX model to compare with (default: the bundle's own source)",
    )
    add("--against", metavar="ENGINE", nargs="+", default=["onnxruntime"], help=PEERS)
    add("--batch", metavar="N", nargs="+", default=["1"], help="batch sizes to time")
    add(
        "--length",
        metavar="N",
        nargs="+",
        default=["128"],
        help="sequence lengths to time, in tokens",
    )
    add("--repeat", metavar="N", type=int, default=30, help="timed calls of each engine")
    form = parser.add_mutually_exclusive_group().add_argument
    form("--markdown", action="store_true", help="print the tables as Markdown")
    form("--csv", action="store_true", help="print every number of the first table as CSV")
    add(
        "--startup",
        action="store_true",
        help="time and memory of new processes too, as a second table",
    )
    add("--into", "--update-readme", metavar="FILE[#NAME]", help=INTO)
    add_some_config(parser, *CONFIG)


def run(options: Namespace, progress: Progress) -> Outcome:
    """One report, or a list of one each; and their tables."""
    from bertile.bench import benchmark, result_tables
    from bertile.cli.option_lists import numbers, words

    reports = benchmark.bench_models(
        options.targets,
        read_config(options),
        progress,
        onnx=options.onnx and Path(options.onnx),
        against=words(options.against),
        batches=numbers("--batch", options.batch),
        lengths=numbers("--length", options.length),
        repeat=options.repeat,
        startup=options.startup,
    )
    if options.into:
        command = shlex.join(["bertile", *sys.argv[1:]])
        result_tables.write_table(options.into, reports, command)
    text = (
        result_tables.as_csv(reports)
        if options.csv
        else result_tables.as_table(reports, markdown=options.markdown)
    )
    return Outcome(reports[0] if len(reports) == 1 else reports, text)
