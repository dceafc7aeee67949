"""Makes a Config of the command line: a flag for each of its fields, --config and --save-config."""

from __future__ import annotations

import dataclasses
import os
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bertile.base.allowed import HEADS, LIBCS, RANGES, ROUNDINGS, RUNNERS, RUNTIMES, TUNE_EFFORTS
from bertile.base.errors import UsageError
from bertile.numerics.precision import PRECISIONS, SPARSE
from bertile.targets.processors import PROCESSORS

if TYPE_CHECKING:
    from bertile.config import Config  # which imports numpy: not for --help


class Flag(NamedTuple):
    """A row: the flag of a field of Config. `values` are the words that it may be, where `metavar`
    does not list them; `without` is what it is by --no-NAME, where there is such a flag.
    """

    name: str
    metavar: str | None
    kind: Any
    group: str
    help: str
    values: tuple[str, ...] = ()
    without: str | None = None


MODEL, MACHINE, NUMBERS, TUNING, FILES = (
    "the model",
    "the machine",
    "precision and accuracy",
    "tuning",
    "files and directories",
)
_ROWS = ", ".join(f"{name} ({processors})" for name, processors in PROCESSORS.items())

# In the order of Config's fields; help shows them by group.
CONFIG_FLAGS: tuple[Flag, ...] = (
    Flag(
        "--target",
        "NAME",
        str,
        MACHINE,
        f"native (default: this machine), or one of: {_ROWS}",
        ("native", *PROCESSORS),
    ),
    Flag(
        "--precision",
        "|".join(PRECISIONS),
        str,
        NUMBERS,
        "number format of weights and activations (default: fp32)",
    ),
    Flag(
        "--sparse",
        "|".join(SPARSE),
        str,
        NUMBERS,
        "kernels that skip zero weights: where faster (default), never, or always",
    ),
    Flag(
        "--tune",
        "|".join(TUNE_EFFORTS),
        str,
        TUNING,
        "how long to search for faster kernels; auto (default): 5 s at most, on a processor new to"
        " the log",
    ),
    Flag(
        "--lengths", "16,128", str, TUNING, "sequence lengths to tune for, all of the same weight"
    ),
    Flag(
        "--trials",
        "N",
        int,
        TUNING,
        "candidates to try of each kernel (default: quick 32, full 2000)",
    ),
    Flag("--timeout", "SECONDS", float, TUNING, "stop tuning after this time"),
    Flag(
        "--runner",
        "|".join(RUNNERS),
        str,
        TUNING,
        "tune by running candidates here (default), or by llvm-mca's estimate",
    ),
    Flag(
        "--rpc-tracker",
        "HOST:PORT",
        str,
        TUNING,
        "tune on the devices that this tracker shares out",
    ),
    Flag("--rpc-key", "KEY", str, TUNING, "the key of the devices to use"),
    Flag(
        "--threads",
        "N",
        int,
        MACHINE,
        "threads to compile, tune and measure for (default: all cores)",
    ),
    Flag(
        "--runtime",
        "|".join(RUNTIMES),
        str,
        MACHINE,
        "include (default): put the TVM runtime and the loaders into the bundle, which then needs"
        " numpy alone",
        without="none",
    ),
    Flag(
        "--runtime-from",
        "FILE",
        str,
        MACHINE,
        "wheel or directory of the TVM runtime for the target",
    ),
    Flag("--libc", "|".join(LIBCS), str, MACHINE, "the C library of the target's system"),
    Flag(
        "--head",
        "NAME",
        str,
        MODEL,
        f"the model's task (default: the one that the checkpoint names): {', '.join(HEADS)}",
        HEADS,
    ),
    Flag(
        "--labels",
        "yes,no",
        str,
        MODEL,
        "of a decoder, the logits of these words alone at the last token; an id as #9693",
    ),
    Flag(
        "--allow-unused",
        None,
        bool,
        MODEL,
        "accept weights and settings in a checkpoint that its model does not use",
    ),
    Flag(
        "--trust-remote-code",
        None,
        bool,
        MODEL,
        "run the Python code that a checkpoint brings (auto_map): compile what that computes",
    ),
    Flag(
        "--output-hidden-states",
        None,
        bool,
        MODEL,
        "add outputs hidden_states.0, .1, …: what goes into each layer of a checkpoint, and comes"
        " out of the last",
    ),
    Flag(
        "--output-attentions",
        None,
        bool,
        MODEL,
        "add outputs attentions.0, .1, …: the probabilities of each layer of a checkpoint",
    ),
    Flag(
        "--rename",
        "OLD=NEW",
        list,
        MODEL,
        "rename an input of an ONNX file, as in ids=input_ids; may be repeated",
    ),
    Flag(
        "--tokenizer",
        "DIR",
        str,
        MODEL,
        "directory of the tokenizer and config.json of an ONNX file (default: where the file is)",
    ),
    Flag(
        "--exit-threshold",
        "0..1",
        float,
        MODEL,
        "let a text leave at an early head of the checkpoint whose confidence is above this",
    ),
    Flag("--log-dir", "DIR", str, FILES, "your own tuning logs, which are read and written"),
    Flag(
        "--shipped-log", None, bool, FILES, "use the tuning logs that come with Bertile (default)"
    ),
    Flag("--cache-dir", "DIR", str, FILES, "where the results of stages are cached"),
    Flag(
        "--dump-ir", "DIR", str, FILES, "write the graph after each phase of optimization, as text"
    ),
    Flag(
        "--calibrate",
        "FILE",
        str,
        NUMBERS,
        "int8, int4: samples to calibrate on: a .txt with a text per line, or an .npz",
    ),
    Flag(
        "--ranges",
        "|".join(RANGES),
        str,
        NUMBERS,
        "int8: ranges of activations: per token (dynamic, default), or fixed on --calibrate's"
        " samples",
    ),
    Flag(
        "--group-size",
        "32|64",
        int,
        NUMBERS,
        "int4: how many weights in a row share a scale (default: 32)",
    ),
    Flag(
        "--rounding",
        "|".join(ROUNDINGS),
        str,
        NUMBERS,
        "int4: round weights to the nearest (default), or by GPTQ on --calibrate's samples",
    ),
    Flag(
        "--smooth",
        "0..1",
        float,
        NUMBERS,
        "int8, int4: SmoothQuant's alpha: the share of outliers that moves into the weights",
    ),
    Flag(
        "--max-drop",
        "LOSS",
        str,
        NUMBERS,
        "int8, int4: largest accepted loss of --eval's metric: 0.5%, or 0.005 as a fraction",
    ),
    Flag(
        "--eval",
        "FILE",
        str,
        NUMBERS,
        "what --max-drop is measured on: labelled .tsv/.jsonl, or sentences .txt",
    ),
)
FLAGS = {flag.name.removeprefix("--"): flag for flag in CONFIG_FLAGS}
# What decides how a model is exported.
EXPORT_FLAGS = (
    "head",
    "labels",
    "allow-unused",
    "trust-remote-code",
    "output-hidden-states",
    "output-attentions",
    "rename",
    "tokenizer",
    "exit-threshold",
    "cache-dir",
)


def add_config(parser: ArgumentParser, *names: str) -> dict[str, Any]:
    """The flags of these fields of Config, or of all, and what reads, saves and tries them; gives
    their groups by title.
    """
    groups = add_some_config(parser, *names)
    if MACHINE in groups:
        groups[MACHINE].add_argument(
            "--mcpu",
            metavar="NAME",
            help="LLVM's name of the processor, for --target aarch64: cortex-a55, say",
        )
    add = parser.add_argument_group("options as a whole").add_argument
    add("--config", metavar="FILE", help="read options from a JSON file; flags override the file")
    add("--save-config", metavar="FILE", help="write all options into a JSON file")
    add(
        "--dry-run",
        action="store_true",
        help="check everything, print what would be done, stop",
    )
    return groups


def add_some_config(parser: ArgumentParser, *names: str) -> dict[str, Any]:
    """The flags of these fields of Config, or of all; gives their groups by title."""
    chosen = [flag for name, flag in FLAGS.items() if not names or name in names]
    titles = [
        title
        for title in (MODEL, MACHINE, NUMBERS, TUNING, FILES)
        if any(flag.group == title for flag in chosen)
    ]
    groups = {title: parser.add_argument_group(title) for title in titles}
    for flag in chosen:
        takes = {"metavar": flag.metavar, "type": flag.kind}
        if flag.kind is bool:
            takes = {"action": BooleanOptionalAction}
        if flag.kind is list:
            takes = {"metavar": flag.metavar, "action": "append"}
        text = flag.help.replace("%", "%%")
        add = groups[flag.group].add_argument
        field = add(flag.name, default=SUPPRESS, help=text, **takes).dest
        if flag.without:
            takes = {"action": "store_const", "const": flag.without, "dest": field}
            name = f"--no-{flag.name.removeprefix('--')}"
            add(name, default=SUPPRESS, help=f"the same as {flag.name} {flag.without}", **takes)
    return groups


def read_config(options: Namespace) -> Config:
    """The Config of --config, overridden by the flags that were given; saved by --save-config."""
    from bertile.config import Config

    fields = [field.name for field in dataclasses.fields(Config)]
    flags = {name: getattr(options, name) for name in fields if hasattr(options, name)}
    config = Config()
    if getattr(options, "config", None):
        try:
            text = Path(options.config).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--config {options.config} cannot be read: {error}") from error
        config = Config.from_json(text)
    config = dataclasses.replace(config, **flags)
    if getattr(options, "mcpu", None):
        from bertile.targets.rows import with_processor

        config = dataclasses.replace(config, target=with_processor(config.target, options.mcpu))
    if getattr(options, "save_config", None):
        Path(options.save_config).write_text(config.to_json(), encoding="utf-8")
    return dataclasses.replace(config, cache_dir=cache_directory(config.cache_dir))


def cache_directory(asked: str | None) -> str | None:
    """The cache that was asked for, else XDG_CACHE_HOME's: no stage reads the environment."""
    shared = os.environ.get("XDG_CACHE_HOME", "")
    return asked or (str(Path(shared) / "bertile") if os.path.isabs(shared) else None)
