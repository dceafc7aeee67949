"""Runs `bertile verify`: compares a bundle with ONNX Runtime."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from bertile.base.progress import Progress
from bertile.cli.command import Outcome, add_bundle
from bertile.cli.config_flags import add_some_config, read_config
from bertile.cli.option_lists import positive


def add_arguments(parser: ArgumentParser) -> None:
    """A bundle, the model that it is compared with, and how it is run."""
    add_bundle(parser)
    parser.add_argument(
        "--onnx",
        metavar="FILE",
        help="the ONNX model to compare with (default: the bundle's own source)",
    )
    parser.add_argument("--threads", metavar="N", type=positive, help="threads to use")
    add_some_config(parser, "runtime-from")


def run(options: Namespace, progress: Progress) -> Outcome:
    """Compare; exit code 4 where the difference is past the tolerance."""
    from bertile.run import opener
    from bertile.verify import verifier

    bundle, source = Path(options.bundle), read_config(options).runtime_from
    check = verifier.verify(
        bundle, options.onnx, options.threads, progress, opener.parts_of(bundle, source)
    )
    close = check["max_abs_difference"] <= check["tolerance"]
    return Outcome(check, verifier.as_text(check), 0 if close else 4)
