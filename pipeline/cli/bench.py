"""Runs `bertile bench`: times bundles or models and their peers in turn on the same inputs."""

from __future__ import annotations

import shlex
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bertile.base.progress import Progress
from bertile.cli.command import Outcome
from bertile.cli.config_flags import add_some_config, read_config
from bertile.cli.option_lists import positive

if TYPE_CHECKING:
    from bertile.bench.serving import Service

CONFIG = ("threads", "precision", "sparse", "log-dir", "shipped-log", "cache-dir")
LENGTHS = "sequence lengths to time, in tokens (default: 128, or as many as the model takes)"
PEERS = (
    "onnxruntime (default), openvino, torch, torch-compile, deepsparse, llamacpp, each in the"
    " bundle's precision, or in another as openvino:bf16 or onnxruntime:int4; another bundle's"
    " directory; or none; with blanks or commas between"
)
INTO = (
    "put the tables into a page, at <!-- bench -->, <!-- bench-PRECISION -->, <!-- bench-load -->,"
    " <!-- bench-streams -->, <!-- bench-traffic --> or <!-- NAME --> (--update-readme is its old"
    " name)"
)
# Flags that ask for callers and their requests, by their names in the options.
SERVING = ("duration", "concurrency", "streams", "rate", "input", "mix", "load")


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
    add("--length", metavar="N", nargs="+", help=LENGTHS)
    add("--repeat", metavar="N", type=positive, default=30, help="timed calls of each engine")
    form = parser.add_mutually_exclusive_group().add_argument
    form("--markdown", action="store_true", help="print the tables as Markdown")
    form("--csv", action="store_true", help="print every number of the first table as CSV")
    add(
        "--startup",
        action="store_true",
        help="time and memory of new processes too, as a second table",
    )
    add("--into", "--update-readme", metavar="FILE[#NAME]", help=INTO)
    group = parser.add_argument_group(
        "serving", "Calls a second and percentiles of the latency, as callers see them."
    )
    _add_serving(group.add_argument)
    add_some_config(parser, *CONFIG)


def _add_serving(add: Any) -> None:
    add("--duration", metavar="SECONDS", type=float, help="call each engine for so many seconds")
    add(
        "--concurrency",
        metavar="N",
        type=int,
        help="callers at the same time (default: as many as streams)",
    )
    streams = (
        "calls that an engine answers at the same time, sharing the threads; several are compared"
    )
    add("--streams", metavar="N", nargs="+", help=streams)
    rate = "requests a second, at random moments; a latency counts from when a request is due"
    add("--rate", metavar="R", type=float, help=rate)
    add(
        "--input",
        metavar="FILE",
        help="your own requests: a .txt with a text per line, or an .npz of inputs",
    )
    mix = "mixed lengths in tokens: 8-128, or with shares 16:0.5,128:0.5"
    add("--lengths", metavar="MIX", dest="mix", help=mix)
    load = (
        "measure on an idle machine, beside one busy core, with all cores busy, and beside a second"
        " process of the engine (default: 32 tokens, 5 seconds of each)"
    )
    add("--load", action="store_const", const=True, help=load)


def run(options: Namespace, progress: Progress) -> Outcome:
    """One report, or a list of one each; and their tables."""
    from bertile.bench import benchmark, pages, result_tables, serving, serving_tables
    from bertile.cli.option_lists import numbers, words

    if options.into:
        pages.look_at(options.into)
    asked = [name for name in SERVING if getattr(options, name) is not None]
    choices: dict[str, Any] = {"against": words(options.against)}
    if asked:
        tables = serving_tables
        choices |= {"measure": serving.bench, "service": _service(options)}
    else:
        tables = result_tables
        choices |= {
            "batches": numbers("--batch", options.batch),
            "lengths": numbers("--length", options.length) if options.length else (),
            "repeat": options.repeat,
            "startup": options.startup,
        }
    onnx = options.onnx and Path(options.onnx)
    reports = benchmark.bench_models(
        options.targets, read_config(options), progress, onnx=onnx, **choices
    )
    if options.into:
        command = shlex.join(["bertile", *sys.argv[1:]])
        content = tables.as_table(reports, markdown=True)
        pages.write_table(options.into, tables.place_of(reports), content, command)
    text = (
        tables.as_csv(reports)
        if options.csv
        else tables.as_table(reports, markdown=options.markdown)
    )
    return Outcome(reports[0] if len(reports) == 1 else reports, text)


def _service(options: Namespace) -> Service:
    """What the flags of SERVING ask for; UsageError for those that do not go together."""
    from bertile.base.errors import UsageError
    from bertile.bench import serving, workloads
    from bertile.cli.option_lists import numbers
    from bertile.run.requests import USUAL_LENGTH

    if options.startup:
        raise UsageError("--startup is another measurement", "run it without flags for serving")
    if options.length and (options.mix or options.input):
        other = "--lengths" if options.mix else "--input"
        raise UsageError(f"--length and {other} exclude each other", "leave one of them out")
    seconds = options.duration
    if seconds is None and options.load:
        seconds = serving.LOAD_SECONDS
    return serving.Service(
        batches=numbers("--batch", options.batch),
        lengths=numbers("--length", options.length) if options.length else (),
        usual=serving.LOAD_LENGTH if options.load else USUAL_LENGTH,
        mix=workloads.parse_mix(options.mix) if options.mix else None,
        source=Path(options.input) if options.input else None,
        streams=numbers("--streams", options.streams or ["1"]),
        callers=options.concurrency,
        rate=options.rate,
        seconds=seconds,
        repeat=options.repeat,
        loads=serving.LOADS if options.load else (serving.IDLE,),
    )
