"""Parses the command line, runs the command that it names and prints what it gives."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from bertile.base.errors import UsageError, nearest
from bertile.cli import parser
from bertile.cli.parser import Parser
from bertile.families import table

if TYPE_CHECKING:
    from bertile.base.progress import Progress

# Nothing else of Bertile is imported up here: `bertile --help` must not pay for numpy or TVM.

# In the order of --help. A command is the module of its name in this folder, imported when it is
# asked for: `add_arguments(parser)` says what it takes, and `run(options, progress)` does it.
COMMANDS = {
    "compile": "compile a model into a deployable bundle, verified against ONNX Runtime",
    "export": "export a model to ONNX, the first stage of a compile",
    "prune": "set most weights of a model to zero, to be retrained",
    "compress": "train a model into a smaller or faster one: pruned, distilled, in int8",
    "pareto": "draw what models are worth against what they cost, in one page",
    "tune": "search for faster kernels, and log them for later compiles",
    "verify": "compare a bundle's outputs with ONNX Runtime's",
    "bench": "time a bundle or a model beside other engines",
    "run": "answer texts with a bundle: vectors, labels, entities, answers, words",
    "serve": "answer texts over HTTP, for clients of Text Embeddings Inference and OpenAI",
    "report": "write an HTML page about a bundle: kernels, tuning curves, gains",
    "inspect": "list a bundle's kernels: origin, time, share of the machine's peak",
    "device": "tune on other machines: serve one, list them, share them out",
    "families": "list the model types that can be compiled, and by which road",
    "targets": "list the processors and GPUs that can be compiled for",
    "cache": "show what is cached, or remove it",
    "doctor": "check this machine, and say how to solve each problem",
    "demo": "compile a sentence encoder, compare sentences, time it",
    "completion": "print a script that makes a shell complete commands and flags",
    "help": "explain a command",
}


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
    from bertile.base import screen, tables
    from bertile.base.progress import Progress
    from bertile.cli.command import Stream

    progress, stdout = Progress(options.verbose - options.quiet), sys.stdout
    try:
        # What libraries print is no data: stdout is for the result alone.
        with contextlib.redirect_stdout(sys.stderr):
            outcome = _command(options.command).run(options, progress)
            if isinstance(outcome, Stream):
                _print_lines(outcome.lines, stdout, progress)
    finally:
        progress.close()
    if isinstance(outcome, Stream):
        return outcome.exit_code
    if options.json:
        print(tables.as_json(outcome.data), flush=True)
    else:
        screen.show(outcome.text, sys.stdout)
    return outcome.exit_code


def _print_lines(lines: Iterator[str], stdout: TextIO, progress: Progress) -> None:
    """Print lines as they come, with a bar where nobody sees them come."""
    from bertile.base import screen

    with contextlib.ExitStack() as stack:
        # which ends what is still at work, where the reader goes away
        stack.enter_context(contextlib.closing(lines))
        bar = None if stdout.isatty() else stack.enter_context(progress.bar("lines"))
        for line in lines:
            screen.show(line, stdout)
            if bar is not None:
                bar.advance()


def _command(name: str) -> Any:
    """The module of a command."""
    return importlib.import_module(f"bertile.cli.{name}")


def _explain(error: Exception) -> int:
    from bertile.base import extras
    from bertile.base.errors import BertileError

    if isinstance(error, BertileError):
        return _fail(str(error), error.exit_code)
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        return _fail(f"{place}{error.strerror}", 1)
    if isinstance(error, ModuleNotFoundError) and (extra := extras.extra_of(error.name or "")):
        remedy = f"install it with: pip install 'bertile[{extra}]'"
        return _fail(f"this step needs the package {error.name}; {remedy}", 3)
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return _fail(f"an unexpected error: {text}; run it again with --debug and report it", 1)


def _fail(text: str, code: int) -> int:
    from bertile.base import screen

    screen.show(f"bertile: {text}", sys.stderr)
    return code


def _clean_up_when_terminated() -> None:
    import signal

    # As an exception, so that half-made directories are removed as they are after Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    # No flag in front of the command takes a value: the first word is the command.
    place = next((i for i, word in enumerate(arguments) if not word.startswith("-")), None)
    before = arguments if place is None else arguments[:place]
    name = None if place is None else arguments[place]
    top, parsers = _parser(*(command for command in COMMANDS if command == name))
    options = parser.parse(top, _add_top, before)
    if name is None:
        top.error("the following arguments are required: COMMAND")
    if name not in COMMANDS:
        raise UsageError(f"command '{name}' is unknown{nearest(name, COMMANDS)}")
    options = parser.parse(parsers[name], _adder(name), arguments[place + 1 :], options)
    options.command = name
    for flag, default in (("json", False), ("quiet", 0), ("verbose", 0), ("debug", False)):
        setattr(options, flag, getattr(options, flag, default))
    return options


def _parser(*asked: str) -> tuple[Parser, dict[str, Parser]]:
    """What shows help: of the program and of its commands, of which those in `asked` know their own
    flags.
    """
    top = Parser(
        prog="bertile",
        description=f"Compile encoders into small, fast native libraries: {table.titles()}.",
        usage="bertile COMMAND ... [FLAG ...]",
        epilog="bertile help COMMAND explains one command.",
    )
    _add_top(top)
    subparsers = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    parsers = {}
    for name, help_text in COMMANDS.items():
        description = f"{help_text[0].upper()}{help_text[1:]}."
        parsers[name] = subparsers.add_parser(
            name, prog=f"bertile {name}", help=help_text, description=description
        )
        if name in asked:
            _adder(name)(parsers[name])
            parsers[name].shorten_usage()
    return top, parsers


def _adder(name: str) -> Callable[[argparse.ArgumentParser], None]:
    """What gives a parser all that a command takes."""

    def add(whole: argparse.ArgumentParser) -> None:
        _command(name).add_arguments(whole)
        _add_global(whole)

    return add


def _add_top(top: argparse.ArgumentParser) -> None:
    top.add_argument("--version", action=_Version, nargs=0, help="print the version")
    _add_global(top)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import bertile

        print(f"bertile {bertile.__version__}")
        parser.exit()


def _add_global(parser: argparse.ArgumentParser) -> None:
    # SUPPRESS everywhere: a flag may stand before or behind the command
    group = parser.add_argument_group("options of every command")
    add = group.add_argument
    suppress = argparse.SUPPRESS
    add("--json", action="store_true", default=suppress, help="print the result as JSON")
    add("-q", "--quiet", action="count", default=suppress, help="print no progress (stderr)")
    add("-v", "--verbose", action="count", default=suppress, help="print more progress (stderr)")
    add("--debug", action="store_true", default=suppress, help="show the traceback of an error")
