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
        f"what to compile for: native (default: the first row that this machine has), {_ROWS}",
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
        "skip zeros in weights where that is faster (default), never, or always",
    ),
    Flag(
        "--tune",
        "|".join(TUNE_EFFORTS),
        str,
        TUNING,
        "how long to search for faster kernels; auto (default): at most 5 s, for a processor new to"
        " the log",
    ),
    Flag("--lengths", "16,128", str, TUNING, "numbers of tokens that a search weighs alike"),
    Flag("--trials", "N", int, TUNING, "candidates to try of each kernel (quick: 32, full: 2000)"),
    Flag("--timeout", "SECONDS", float, TUNING, "stop the search after this time"),
    Flag(
        "--runner",
        "|".join(RUNNERS),
        str,
        TUNING,
        "run the candidates here (default), or rank them by llvm-mca's estimate",
    ),
    Flag("--rpc-tracker", "HOST:PORT", str, TUNING, "tune on the devices of this RPC tracker"),
    Flag("--rpc-key", "KEY", str, TUNING, "which of its devices"),
    Flag("--threads", "N", int, MACHINE, "cores to plan, tune and measure for (default: all)"),
    Flag(
        "--runtime",
        "|".join(RUNTIMES),
        str,
        MACHINE,
        "include (default): the bundle brings TVM's runtime and the loaders along, and needs numpy"
        " alone",
        without="none",
    ),
    Flag("--runtime-from", "FILE", str, MACHINE, "wheel or directory of the target's TVM runtime"),
    Flag("--libc", "|".join(LIBCS), str, MACHINE, "the C library of the target's system"),
    Flag(
        "--head",
        "NAME",
        str,
        MODEL,
        f"what the model computes (default: what the checkpoint says): {', '.join(HEADS)}",
        HEADS,
    ),
    Flag(
        "--allow-unused",
        None,
        bool,
        MODEL,
        "take a checkpoint that says or holds more than its model",
    ),
    Flag(
        "--rename",
        "OLD=NEW",
        list,
        MODEL,
        "call an input of an ONNX file input_ids, say; may be repeated",
    ),
    Flag(
        "--tokenizer",
        "DIR",
        str,
        MODEL,
        "whose tokenizer and config.json belong to an ONNX file (default: those beside it)",
    ),
    Flag("--log-dir", "DIR", str, FILES, "your own tuning logs, read and written"),
    Flag(
        "--shipped-log", None, bool, FILES, "use the tuning logs that come with Bertile (default)"
    ),
    Flag("--cache-dir", "DIR", str, FILES, "where stage results are kept"),
    Flag("--dump-ir", "DIR", str, FILES, "write one readable module per phase"),
    Flag(
        "--calibrate",
        "FILE",
        str,
        NUMBERS,
        "int8, int4: observe inputs on a text a line (.txt), or .npz",
    ),
    Flag(
        "--ranges",
        "|".join(RANGES),
        str,
        NUMBERS,
        "int8: per token (dynamic, default), or fixed by --calibrate",
    ),
    Flag("--group-size", "32|64", int, NUMBERS, "int4: inputs that share a scale of their weights"),
    Flag(
        "--rounding",
        "|".join(ROUNDINGS),
        str,
        NUMBERS,
        "int4: to the nearest (default), or gptq, which makes up for errors by --calibrate",
    ),
    Flag(
        "--smooth",
        "0..1",
        float,
        NUMBERS,
        "int8, int4: share of outliers to move from inputs to weights",
    ),
    Flag(
        "--max-drop",
        "LOSS",
        str,
        NUMBERS,
        "int8, int4: largest accepted loss of the metric of --eval: 0.5%, or as a fraction 0.005",
    ),
    Flag(
        "--eval",
        "FILE",
        str,
        NUMBERS,
        "what --max-drop measures: labelled .tsv/.jsonl, or sentences .txt",
    ),
)
FLAGS = {flag.name.removeprefix("--"): flag for flag in CONFIG_FLAGS}
# What decides how a model is exported.
EXPORT_FLAGS = ("head", "allow-unused", "rename", "tokenizer", "cache-dir")


def add_config(parser: ArgumentParser, *names: str) -> dict[str, Any]:
    """The flags of these fields of Config, or of all, and what reads, saves and tries them; gives
    their groups by title.
    """
    groups = add_some_config(parser, *names)
    if MACHINE in groups:
        groups[MACHINE].add_argument(
            "--mcpu", metavar="NAME", help="the processor, for --target aarch64: cortex-a55, say"
        )
    add = parser.add_argument_group("all choices").add_argument
    add("--config", metavar="FILE", help="read choices from JSON; flags override the file")
    add("--save-config", metavar="FILE", help="write all choices as JSON")
    add("--dry-run", action="store_true", help="check all that, say what would be done, and stop")
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
