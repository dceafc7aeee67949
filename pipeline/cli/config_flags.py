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
    ("--target", "NAME", str, "native, or a name that `bertile targets` lists"),
    ("--precision", "|".join(PRECISIONS), str, "number format of weights and activations"),
    ("--sparse", "|".join(SPARSE), str, "skip zeros in weights where faster, never, or always"),
    (
        "--tune",
        "auto|none|quick|full",
        str,
        "how long to search for faster kernels; auto: at most 5 s, for a processor new to the log",
    ),
    (
        "--lengths",
        "16,128",
        str,
        "numbers of tokens that a search weighs alike",
    ),
    ("--trials", "N", int, "kernels to try while tuning, instead of what --tune says"),
    ("--timeout", "SECONDS", float, "stop tuning after this time"),
    ("--runner", "local|mca", str, "tune by running kernels here, or by llvm-mca's estimate"),
    ("--rpc-tracker", "HOST:PORT", str, "tune on the devices of this RPC tracker"),
    ("--rpc-key", "KEY", str, "which of its devices"),
    ("--threads", "N", int, "cores to plan, tune and measure for"),
    ("--runtime", "none|include", str, "put the TVM runtime and the loaders into the bundle"),
    ("--runtime-from", "FILE", str, "wheel or directory of the TVM runtime for the target"),
    ("--libc", "glibc|musl", str, "the C library of the target's system"),
    ("--head", "NAME", str, "what the model computes, instead of what the checkpoint says"),
    (
        "--allow-unused",
        None,
        bool,
        "take a checkpoint that says or holds more than its model",
    ),
    ("--rename", "OLD=NEW", list, "call an input of an ONNX file input_ids, say; may be repeated"),
    ("--log-dir", "DIR", str, "your own tuning logs, read and written"),
    ("--shipped-log", None, bool, "use the tuning logs that come with Bertile (default)"),
    ("--cache-dir", "DIR", str, "where stage results are kept"),
    ("--dump-ir", "DIR", str, "write one readable module per phase"),
    (
        "--calibrate",
        "FILE",
        str,
        "int8, int4: observe inputs on a text a line (.txt), or .npz",
    ),
    ("--ranges", "dynamic|minmax|percentile|mse", str, "int8: per token, or fixed by --calibrate"),
    ("--group-size", "32|64", int, "int4: inputs that share a scale of their weights"),
    (
        "--rounding",
        "nearest|gptq",
        str,
        "int4: gptq makes up for errors, by --calibrate",
    ),
    ("--smooth", "0..1", float, "int8, int4: share of outliers to move from inputs to weights"),
    (
        "--max-drop",
        "LOSS",
        str,
        "int8, int4: largest accepted loss of the metric of --eval: 0.5%, or as a fraction 0.005",
    ),
    ("--eval", "FILE", str, "what --max-drop measures: labelled .tsv/.jsonl, or sentences .txt"),
)


def add_config(parser: ArgumentParser) -> None:
    """A flag for every field of Config, and what reads, saves and tries them."""
    add = add_some_config(parser).add_argument
    add("--mcpu", metavar="NAME", help="the processor, for --target aarch64")
    add("--config", metavar="FILE", help="read choices from JSON; flags go first")
    add("--save-config", metavar="FILE", help="write all choices as JSON")
    add("--dry-run", action="store_true", help="say what would be done, and stop")


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
