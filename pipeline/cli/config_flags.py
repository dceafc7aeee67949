"""Makes a Config of the command line: a flag for each of its fields, --config and --save-config."""

from __future__ import annotations

import dataclasses
import os
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bertile.base.errors import UsageError
from bertile.numerics.precision import PRECISIONS, SPARSE

if TYPE_CHECKING:
    from bertile.config import Config  # which imports numpy: not for --help

CONFIG_FLAGS: tuple[tuple[str, str | None, Any, str], ...] = (
    ("--target", "NAME", str, "native (this machine), or a name that `bertile targets` lists"),
    ("--precision", "|".join(PRECISIONS), str, "number format of weights and activations"),
    (
        "--sparse",
        "|".join(SPARSE),
        str,
        "kernels that skip zero weights: where faster, never, or always",
    ),
    (
        "--tune",
        "auto|none|quick|full",
        str,
        "how long to search for faster kernels; auto: 5 s at most, on a processor new to the log",
    ),
    (
        "--lengths",
        "16,128",
        str,
        "sequence lengths to tune for, all of the same weight",
    ),
    ("--trials", "N", int, "candidates to try, instead of the number that --tune implies"),
    ("--timeout", "SECONDS", float, "stop tuning after this time"),
    ("--runner", "local|mca", str, "tune by running candidates here, or by llvm-mca's estimate"),
    ("--rpc-tracker", "HOST:PORT", str, "tune on the devices that this tracker shares out"),
    ("--rpc-key", "KEY", str, "the key of the devices to use"),
    ("--threads", "N", int, "threads to compile, tune and measure for"),
    ("--runtime", "none|include", str, "put the TVM runtime and the loaders into the bundle"),
    ("--runtime-from", "FILE", str, "wheel or directory of the TVM runtime for the target"),
    ("--libc", "glibc|musl", str, "the C library of the target's system"),
    ("--head", "NAME", str, "the model's task, instead of the one that the checkpoint names"),
    (
        "--allow-unused",
        None,
        bool,
        "accept weights and settings in a checkpoint that its model does not use",
    ),
    (
        "--rename",
        "OLD=NEW",
        list,
        "rename an input of an ONNX file, as in ids=input_ids; may be repeated",
    ),
    ("--log-dir", "DIR", str, "your own tuning logs, which are read and written"),
    ("--shipped-log", None, bool, "use the tuning logs that come with Bertile (default)"),
    ("--cache-dir", "DIR", str, "where the results of stages are cached"),
    ("--dump-ir", "DIR", str, "write the graph after each phase of optimization, as text"),
    (
        "--calibrate",
        "FILE",
        str,
        "int8: samples to calibrate on: a .txt with a text per line, or an .npz",
    ),
    (
        "--ranges",
        "dynamic|minmax|percentile|mse",
        str,
        "int8: ranges of activations: per token, or fixed on --calibrate's samples",
    ),
    (
        "--smooth",
        "0..1",
        float,
        "int8: SmoothQuant's alpha: the share of outliers that moves into the weights",
    ),
    (
        "--max-drop",
        "LOSS",
        str,
        "int8: largest accepted loss of --eval's metric: 0.5%, or 0.005 as a fraction",
    ),
    (
        "--eval",
        "FILE",
        str,
        "what --max-drop is measured on: labelled .tsv/.jsonl, or sentences .txt",
    ),
)


def add_config(parser: ArgumentParser) -> None:
    """A flag for every field of Config, and what reads, saves and tries them."""
    add = add_some_config(parser).add_argument
    add("--mcpu", metavar="NAME", help="LLVM's name of the processor, for --target aarch64")
    add("--config", metavar="FILE", help="read options from a JSON file; flags override the file")
    add("--save-config", metavar="FILE", help="write all options into a JSON file")
    add("--dry-run", action="store_true", help="print what would be done, and stop")


def add_some_config(parser: ArgumentParser, *names: str) -> Any:
    """The flags of these fields of Config, or of all; gives the group that they stand in."""
    group = parser.add_argument_group("configuration")
    for flag, metavar, kind, help_text in CONFIG_FLAGS:
        if not names or flag.removeprefix("--") in names:
            takes = {"metavar": metavar, "type": kind}
            if kind is bool:
                takes = {"action": BooleanOptionalAction}
            if kind is list:
                takes = {"metavar": metavar, "action": "append"}
            group.add_argument(flag, default=SUPPRESS, help=help_text.replace("%", "%%"), **takes)
    return group


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
