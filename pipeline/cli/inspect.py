"""Runs `bertile inspect`: the kernels of a bundle, or what its layers lose or leave out."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from bertile.base.progress import Progress
from bertile.base.tables import table
from bertile.cli.command import Outcome, add_bundle
from bertile.cli.option_lists import LENGTH, positive


def add_arguments(parser: ArgumentParser) -> None:
    """A bundle, which of its sides to look at, and the call that is measured."""
    add_bundle(parser)
    add = parser.add_argument
    only = parser.add_mutually_exclusive_group().add_argument
    only(
        "--quant",
        action="store_true",
        help="show the quantization noise of each layer, instead of times",
    )
    only(
        "--sparse",
        action="store_true",
        help="show the zeros and the kernel of each layer, instead of times",
    )
    add("--batch", metavar="N", type=positive, default=1, help="batch size of the measured call")
    add("--length", metavar="N", type=positive, help=LENGTH)
    add("--threads", metavar="N", type=positive, help="threads to use")


def run(options: Namespace, progress: Progress) -> Outcome:
    """The kernels of a bundle, measured here; or what quantization costs each layer, or where the
    zeros of each layer lie.
    """
    if options.quant:
        return _quantization(options)
    if options.sparse:
        return _sparsity(options)
    from bertile import backends, loader

    bundle = Path(options.bundle)
    backend = backends.of_bundle(loader.read_manifest(bundle))
    report = backend.inspect(bundle, options.batch, options.length, options.threads, progress)
    kernels = report.get("kernels", [])
    plain = (str, int, float, type(None))
    columns = [name for name in (kernels or [{}])[0] if isinstance(kernels[0][name], plain)]
    rows = [[_shown(kernel.get(name)) for name in columns] for kernel in kernels]
    text = table([name.replace("_", " ") for name in columns], rows) if rows else "no kernels"
    if rows:
        text += f"\n\n{backend.summary(report)}"
    if fallen := report.get("fallthrough", []):
        text += f"\n{_small(fallen, kernels)}" + ("" if options.verbose else "; -v lists them")
        text += f": {', '.join(fallen)}" if options.verbose else ""
    return Outcome(report, text)


def _small(operators: list[str], kernels: list[dict[str, Any]]) -> str:
    """How many operators have no kernel of ours, and what share of the time theirs take."""
    shares = [k["time %"] for k in kernels if k["origin"] == "generic" and "time %" in k]
    share = f" ({sum(shares):.0f}% of the time)" if shares else ""
    several = len(operators) != 1
    what = "small operators use" if several else "small operator uses"
    return f"{len(operators)} {what} TVM's own kernels{share}"


def _shown(value: Any) -> Any:
    return "TVM" if value == "generic" else value


def _quantization(options: Namespace) -> Outcome:
    from bertile import loader
    from bertile.quantize import quantizer

    quantization = loader.read_manifest(Path(options.bundle)).get("quantization", {})
    return Outcome(quantization, quantizer.as_text(quantization))


def _sparsity(options: Namespace) -> Outcome:
    from bertile import loader
    from bertile.lower import sparse_choice

    manifest = loader.read_manifest(Path(options.bundle))
    layers = manifest.get("sparsity", [])
    return Outcome(layers, sparse_choice.as_text(layers, manifest["config"].get("sparse", "off")))
