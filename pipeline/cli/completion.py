"""Runs `bertile completion`: prints what makes a shell complete commands, flags and their words."""

from __future__ import annotations

from argparse import Action, ArgumentParser, Namespace

from bertile.base.errors import require
from bertile.base.progress import Progress
from bertile.cli.command import Outcome
from bertile.cli.config_flags import CONFIG_FLAGS

SHELLS = ("bash", "zsh")
# Where the words of a metavar are names of files, by what shtab calls them.
_FILES = ("FILE", "MODEL", "FILE|DIR", "RESULT")
_DIRECTORIES = ("DIR", "BUNDLE", "BUNDLE|MODEL", "BUNDLE|LOGDIR")


def add_arguments(parser: ArgumentParser) -> None:
    """The shell that is to read it."""
    parser.add_argument(
        "shell",
        metavar="|".join(SHELLS),
        choices=SHELLS,
        help='bash: eval "$(bertile completion bash)" in ~/.bashrc;'
        " zsh: bertile completion zsh > a directory of $fpath/_bertile",
    )


def run(options: Namespace, progress: Progress) -> Outcome:
    """The script; MissingExtraError without shtab, which writes it."""
    (shtab,) = require("completion", "shtab")
    from bertile.cli import main

    top, parsers = main._parser(*main.COMMANDS)
    words = {flag.name: flag.values for flag in CONFIG_FLAGS if flag.values}
    for action in (action for parser in parsers.values() for action in parser._actions):
        _say(action, words, shtab)
    next(place for place in parsers["help"].places).choices = tuple(main.COMMANDS)
    script = shtab.complete(top, options.shell)
    return Outcome(script, script)


def _say(action: Action, words: dict[str, tuple[str, ...]], shtab: object) -> None:
    """Tell shtab what completes an argument: words of a list, names of files or of directories."""
    name, metavar = next(iter(action.option_strings), ""), action.metavar
    if name in words:
        action.choices = words[name]
    elif metavar in _FILES:
        action.complete = shtab.FILE
    elif metavar in _DIRECTORIES:
        action.complete = shtab.DIRECTORY
    elif isinstance(metavar, str) and "|" in metavar:
        action.choices = tuple(metavar.split("|"))
