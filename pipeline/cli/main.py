"""Parses the command line, builds the Config, calls one function and prints what it gives."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from bertile.cli import bench, device, prune, tune
from bertile.cli.quantization_flags import QUANTIZATION_FLAGS
from bertile.cli.tune import TUNING_FLAGS
from bertile.families import table
from bertile.numerics.precision import PRECISIONS, SPARSE

# Nothing else of Bertile is imported up here: `bertile --help` must not pay for numpy or TVM.

CONFIG_FLAGS: tuple[tuple[str, str | None, Any, str], ...] = (
    ("--target", "NAME", str, "native, or a name that `bertile targets` lists"),
    ("--precision", "|".join(PRECISIONS), str, "number format of weights and activations"),
    ("--sparse", "|".join(SPARSE), str, "skip zeros in weights where faster, never, or always"),
    *TUNING_FLAGS,
    ("--threads", "N", int, "cores to plan, tune and measure for"),
    ("--runtime", "none|include", str, "put the TVM runtime and the loaders into the bundle"),
    ("--runtime-from", "FILE", str, "wheel or directory of the TVM runtime for the target"),
    ("--libc", "glibc|musl", str, "the C library of the target's system"),
    ("--head", "NAME", str, "what the model computes, instead of what the checkpoint says"),
    ("--log-dir", "DIR", str, "your own tuning logs, read and written"),
    ("--shipped-log", None, bool, "use the tuning logs that come with Bertile (default)"),
    ("--cache-dir", "DIR", str, "where stage results are kept"),
    ("--dump-ir", "DIR", str, "write one readable module per phase"),
    *QUANTIZATION_FLAGS,
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        import re

        from bertile.base.errors import UsageError, nearest

        command = re.search(r"invalid choice: '?([^' ]+)'?", message)
        if command:
            known = nearest(command[1], [name for name, _, _ in COMMANDS])
            raise UsageError(f"command '{command[1]}' is unknown{known}")
        raise UsageError(message, f"see: {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 done, 1 failed, 2 usage, 3 environment, 4 numeric mismatch, 130 stopped by Ctrl-C.
    """
    if arguments is None:
        arguments = sys.argv[1:]
        _clean_up_when_terminated()
    try:
        return _run(_parse(arguments))
    except KeyboardInterrupt:
        return _fail("stopped", 130)
    except BrokenPipeError:  # `bertile targets | head -1`: the reader has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if "--debug" in arguments:
            raise
        return _explain(error)


def _run(options: argparse.Namespace) -> int:
    from bertile.base import tables
    from bertile.base.progress import Progress
    from bertile.cli import commands

    progress = Progress(options.verbose - options.quiet)
    try:
        # What libraries print is no data: stdout is for the result alone.
        with contextlib.redirect_stdout(sys.stderr):
            outcome = getattr(commands, options.command)(options, progress)
    finally:
        progress.close()
    print(tables.as_json(outcome.data) if options.json else outcome.text, flush=True)
    return outcome.exit_code


def _explain(error: Exception) -> int:
    from bertile.base.errors import BertileError

    if isinstance(error, BertileError):
        return _fail(str(error), error.exit_code)
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        return _fail(f"{place}{error.strerror}", 1)
    if isinstance(error, ModuleNotFoundError) and (extra := _extra_of(error.name or "")):
        remedy = f"install it with: pip install 'bertile[{extra}]'"
        return _fail(f"this step needs the package {error.name}; {remedy}", 3)
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return _fail(f"an unexpected error: {text}; run it again with --debug and report it", 1)


def _extra_of(module: str) -> str | None:
    from bertile.cli.doctor import extra_of

    return extra_of(module)


def _fail(text: str, code: int) -> int:
    print(f"bertile: {text}", file=sys.stderr)
    return code


def _clean_up_when_terminated() -> None:
    import signal

    # As an exception, so that half-made directories are removed as they are after Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser, parsers = _parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        _refuse(unknown, parsers[options.command])
    for name, default in (("json", False), ("quiet", 0), ("verbose", 0), ("debug", False)):
        setattr(options, name, getattr(options, name, default))
    return options


def _refuse(unknown: list[str], parser: argparse.ArgumentParser) -> NoReturn:
    import difflib

    from bertile.base.errors import UsageError

    flag = next((argument for argument in unknown if argument.startswith("-")), None)
    if flag is None:
        raise UsageError(f"'{unknown[0]}' is one argument too many", f"see: {parser.prog} --help")
    name = flag.partition("=")[0]
    close = difflib.get_close_matches(name, list(parser._option_string_actions), n=1)
    question = f"did you mean '{close[0]}'?" if close else f"see: {parser.prog} --help"
    raise UsageError(f"option '{name}' is unknown", question)


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = _Parser(
        prog="bertile",
        description=f"Compile encoders into small, fast native libraries: {table.titles()}.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    _add_global(parser)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    parsers = {}
    for name, help_text, add_arguments in COMMANDS:
        parsers[name] = subparsers.add_parser(
            name, help=help_text, description=f"{help_text[0].upper()}{help_text[1:]}."
        )
        parsers[name].allow_abbrev = False
        add_arguments(parsers[name])
        _add_global(parsers[name])
    return parser, parsers


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import bertile

        print(f"bertile {bertile.__version__}")
        parser.exit()


def _add_global(parser: argparse.ArgumentParser) -> None:
    # SUPPRESS everywhere: a flag may stand before or behind the command
    group = parser.add_argument_group("for every command")
    add = group.add_argument
    suppress = argparse.SUPPRESS
    add("--json", action="store_true", default=suppress, help="print the result as JSON")
    add("-q", "--quiet", action="count", default=suppress, help="no progress on stderr")
    add("-v", "--verbose", action="count", default=suppress, help="more progress on stderr")
    add("--debug", action="store_true", default=suppress, help="show the stack of an error")


def _add_config(parser: argparse.ArgumentParser) -> None:
    group = _add_some_config(parser)
    group.add_argument("--mcpu", metavar="NAME", help="the processor, for --target aarch64")
    group.add_argument("--config", metavar="FILE", help="read choices from JSON; flags go first")
    group.add_argument("--save-config", metavar="FILE", help="write all choices as JSON")
    group.add_argument("--dry-run", action="store_true", help="say what would be done, and stop")


def _add_some_config(parser: argparse.ArgumentParser, *names: str) -> argparse._ArgumentGroup:
    """The flags of these fields of Config, or of all."""
    group = parser.add_argument_group("configuration")
    for flag, metavar, kind, help_text in CONFIG_FLAGS:
        if not names or flag.removeprefix("--") in names:
            takes = {"metavar": metavar, "type": kind}
            if kind is bool:
                takes = {"action": argparse.BooleanOptionalAction}
            group.add_argument(flag, default=argparse.SUPPRESS, help=help_text, **takes)
    return group


def _add_model(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs=nargs,
        help="a directory or hub id of Hugging Face, an .onnx file, minilm, or synthetic:NAME",
    )


def _compile(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help="what to write")
    _add_config(parser)


def _tune(parser: argparse.ArgumentParser) -> None:
    _add_model(parser, nargs="?")
    tune.add_arguments(parser)
    _add_config(parser)


def _verify(parser: argparse.ArgumentParser) -> None:
    _add_bundle(parser)
    _add_peer(parser)
    parser.add_argument("--threads", metavar="N", type=int, help="cores to use")
    _add_some_config(parser, "runtime-from")


def _bench(parser: argparse.ArgumentParser) -> None:
    bench.add_arguments(parser)
    _add_some_config(parser, *bench.CONFIG)


def _run_text(parser: argparse.ArgumentParser) -> None:
    _add_bundle(parser)
    add = parser.add_argument
    add("texts", metavar="TEXT", nargs="*", help="none: one text per line of stdin")
    add("--truncate", action="store_true", help="cut a text that is too long, instead of failing")
    add("--threads", metavar="N", type=int, help="cores to use")


def _inspect(parser: argparse.ArgumentParser) -> None:
    _add_bundle(parser)
    add = parser.add_argument
    only = parser.add_mutually_exclusive_group().add_argument
    only("--quant", action="store_true", help="the noise of each quantized layer, and no times")
    only("--sparse", action="store_true", help="each layer's zeros and kernel, and no times")
    add("--batch", metavar="N", type=int, default=1, help="sequences in the measured call")
    add("--length", metavar="N", type=int, default=128, help="tokens in a sequence")
    add("--threads", metavar="N", type=int, help="cores to use")


def _report(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="BUNDLE|LOGDIR", help="a bundle with its log, or a tuning log alone")
    add("-o", "--output", metavar="FILE", required=True, help="the HTML page to write")
    add("--no-measure", action="store_true", help="leave out the time of the bundle's kernels")
    add("--batch", metavar="N", type=int, default=1, help="sequences in the measured call")
    add("--length", metavar="N", type=int, default=128, help="tokens in a sequence")
    _add_some_config(parser, "threads", "log-dir")


def _device(parser: argparse.ArgumentParser) -> None:
    device.add_arguments(parser)


def _demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", metavar="DIR", default="out/minilm", help="the bundle")
    _add_config(parser)


def _doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cache-dir", metavar="DIR", help="where stage results are kept")


def _add_bundle(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", help="a directory that compile has written")


def _add_peer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--onnx", metavar="FILE", help="the exported model (default: as compiled)")


COMMANDS: tuple[tuple[str, str, Callable[[argparse.ArgumentParser], None]], ...] = (
    ("compile", "model in, bundle out: every stage, checked", _compile),
    ("export", "model in, canonical ONNX out", _compile),
    ("prune", "model in, the same with most weights zero out", prune.add_arguments),
    ("tune", "search for faster kernels and keep the log", _tune),
    ("verify", "compare a bundle with ONNX Runtime", _verify),
    ("bench", "time a bundle or a model and other engines in turn", _bench),
    ("run", "text in, result out", _run_text),
    ("report", "one HTML page: tuning curves, kernels, before and after", _report),
    ("inspect", "the kernels of a bundle: origin, time, share of peak", _inspect),
    ("device", "boards to tune on: serve one, list them, share them out", _device),
    ("targets", "the machines that can be compiled for", lambda parser: None),
    ("doctor", "check this machine; each problem with its remedy", _doctor),
    ("demo", "compile minilm and compare sentences with it", _demo),
)
