"""Holds what one compile is asked to do: frozen, JSON in and out, bad values refused."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Union

from bertile.base.allowed import HEADS, LIBCS, RANGES, ROUNDINGS, RUNNERS, RUNTIMES, TUNE_EFFORTS
from bertile.base.errors import UsageError, nearest
from bertile.numerics.four_bit import SIZES
from bertile.numerics.precision import PRECISIONS, SPARSE
from bertile.targets.rows import GENERIC
from bertile.targets.rows import names as target_names

LONGEST = 32768  # tokens of a sequence that kernels are measured on


FilePath = Union[str, "os.PathLike[str]"]


class ConfigFields(TypedDict, total=False):
    """The fields of `Config` as keyword arguments, for type checkers."""

    target: str
    precision: str
    sparse: str
    tune: str
    lengths: str | Sequence[int] | None
    trials: int | None
    timeout: float | None
    runner: str
    rpc_tracker: str | None
    rpc_key: str | None
    threads: int | None
    runtime: str
    runtime_from: FilePath | None
    libc: str
    head: str | None
    labels: str | Sequence[str]
    allow_unused: bool
    trust_remote_code: bool
    output_hidden_states: bool
    output_attentions: bool
    rename: str | Sequence[str]
    tokenizer: FilePath | None
    exit_threshold: float | None
    log_dir: FilePath | None
    shipped_log: bool
    cache_dir: FilePath | None
    dump_ir: FilePath | None
    calibrate: FilePath | None
    ranges: str
    group_size: int
    rounding: str
    smooth: float | None
    max_drop: str | float | None
    eval: FilePath | None


@dataclass(frozen=True)
class Config:
    """Every choice of a compile; no stage reads globals or environment variables beside it.

    `lengths` are those that a search weighs, in tokens; None: what most requests have. `trials`,
    `timeout` (seconds) and `threads` are positive, or None for what the effort and the machine
    give. `head` None keeps the checkpoint's own head; `labels` are words of a decoder whose logits
    at the last token are the answer, or ids as #9693; `allow_unused` takes a checkpoint that says
    or holds more than its model reads, without that; `trust_remote_code` runs the code that lies in
    a checkpoint, which is what computes it then; `output_hidden_states` and `output_attentions` add
    what transformers gives by these names, one output a layer; `rename` gives inputs of an ONNX
    file our names, each as OLD=NEW; `tokenizer` is the directory whose tokenizer and config.json
    belong to an ONNX file, in place of those beside it; `exit_threshold` (0 to 1) is the confidence
    above which a text leaves at an early head of the checkpoint; `shipped_log` False leaves out the
    logs that come with the package. Paths may be `Path`s. `sparse` "always" skips zeros even where
    the dense kernel is faster, which is for measuring. `calibrate`, `smooth` (0 to 1), `max_drop`
    (a fraction of the metric: 0.005, or "0.5%") and `eval` are for int8 and int4 alone, `ranges`
    for int8, `group_size` (inputs that share a scale) and `rounding` for int4.
    Raises UsageError for a value that is not allowed, with the nearest one that is.
    """

    target: str = "native"
    precision: str = "fp32"
    sparse: str = "auto"
    tune: str = "auto"
    lengths: tuple[int, ...] | None = None
    trials: int | None = None
    timeout: float | None = None
    runner: str = "local"
    rpc_tracker: str | None = None
    rpc_key: str | None = None
    threads: int | None = None
    runtime: str = "include"
    runtime_from: str | None = None
    libc: str = "glibc"
    head: str | None = None
    labels: tuple[str, ...] = ()
    allow_unused: bool = False
    trust_remote_code: bool = False
    output_hidden_states: bool = False
    output_attentions: bool = False
    rename: tuple[str, ...] = ()
    tokenizer: str | None = None
    exit_threshold: float | None = None
    log_dir: str | None = None
    shipped_log: bool = True
    cache_dir: str | None = None
    dump_ir: str | None = None
    calibrate: str | None = None
    ranges: str = "dynamic"
    group_size: int = 32
    rounding: str = "nearest"
    smooth: float | None = None
    max_drop: float | None = None
    eval: str | None = None

    def __post_init__(self) -> None:
        for name, check in CHECKS.items():
            # object.__setattr__ is the one way to normalise a field of a frozen dataclass
            object.__setattr__(self, name, check(name, getattr(self, name)))
        _check_quantization(self)
        if (self.rpc_tracker is None) != (self.rpc_key is None):
            raise UsageError("--rpc-tracker and --rpc-key need each other", "give both")
        if self.rpc_tracker and self.runner == "mca":
            raise UsageError(
                "--runner mca estimates, and runs nothing on devices", "leave out --rpc-tracker"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """Make a Config from plain values; a key that is no field is refused."""
        if not isinstance(values, Mapping):
            raise UsageError(f"a configuration is an object of keys, not {type(values).__name__}")
        for key in values:
            if key not in CHECKS:
                raise UsageError(f"configuration key '{key}' is unknown{nearest(key, CHECKS)}")
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> Config:
        """Make a Config from the text that `to_json` gives, or from any part of its keys."""
        try:
            values = json.loads(text, object_pairs_hook=_unique_keys)
        except ValueError as error:
            raise UsageError(f"the configuration is not JSON: {error}") from error
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, in the order of their definition."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """The fields as readable JSON; `from_json` gives an equal Config back."""
        return json.dumps(self.to_dict(), indent=2) + "\n"


def configured(config: Config | None, fields: Mapping[str, Any]) -> Config:
    """`config`, or the default one, with these fields in the place of its own.

    Raises UsageError for a field that there is not, with the nearest that there is.
    """
    for name in fields:
        if name not in CHECKS:
            raise UsageError(f"there is no option '{name}'{nearest(name, CHECKS)}")
    return dataclasses.replace(config or Config(), **fields)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise UsageError(f"configuration key '{key}' is there twice", "remove one of the two")
    return dict(pairs)


def _one_of(known: tuple[str, ...], optional: bool = False) -> Callable[[str, Any], Any]:
    def check(name: str, value: Any) -> Any:
        if (optional and value is None) or (isinstance(value, str) and value in known):
            return value
        raise UsageError(f"{name} '{value}' is unknown{nearest(str(value), known)}")

    return check


def _positive(kinds: tuple[type, ...], what: str) -> Callable[[str, Any], Any]:
    def check(name: str, value: Any) -> Any:
        if value is None:
            return None
        number = isinstance(value, kinds) and not isinstance(value, bool)
        if not number or not 0 < value < math.inf:
            raise UsageError(f"{name} is {value!r}", f"give {what} above 0, or leave it out")
        return value

    return check


def _target(name: str, value: Any) -> Any:
    if isinstance(value, str) and value.startswith(f"{GENERIC}-"):
        return value  # of one processor, which LLVM knows or not
    if isinstance(value, str) and value.startswith(("armv7", "armhf", "arm32")):
        raise UsageError(
            f"there is no target '{value}': no release of TVM has a runtime for 32-bit ARM",
            f"run a 64-bit system on the board and take --target arm-a72, or {GENERIC}",
        )
    return _one_of(("native", *target_names()))(name, value)


def _flag(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise UsageError(f"{name} is {value!r}", "give true or false")


def _labels(name: str, value: Any) -> tuple[str, ...]:
    words = value.split(",") if isinstance(value, str) else value
    if not isinstance(words, (list, tuple)) or not all(w and isinstance(w, str) for w in words):
        raise UsageError(f"{name} is {value!r}", "give words, as in yes,no")
    if len(set(words)) < len(words):
        raise UsageError(f"{name} has a word twice: {','.join(words)}")
    return tuple(words)


def _renamed(name: str, value: Any) -> tuple[str, ...]:
    entries = (value,) if isinstance(value, str) else value
    if not isinstance(entries, (list, tuple)):
        raise UsageError(f"{name} is {value!r}", "give a list of OLD=NEW")
    for entry in entries:
        if not isinstance(entry, str) or not all(entry.partition("=")):
            raise UsageError(
                f"{name} has {entry!r}",
                "give OLD=NEW: the input's name in the file, then Bertile's",
            )
    return tuple(entries)


def _lengths(name: str, value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    words = value.split(",") if isinstance(value, str) else value
    try:
        lengths = tuple(int(word) for word in words)
    except (TypeError, ValueError):
        lengths = ()
    if not lengths or not all(0 < length <= LONGEST for length in lengths):
        raise UsageError(f"{name} is {value!r}", f"give numbers of tokens up to {LONGEST}: 16,128")
    return lengths


def _group_size(name: str, value: Any) -> int:
    if value in SIZES and not isinstance(value, bool):
        return int(value)
    raise UsageError(f"{name} is {value!r}", f"give {' or '.join(map(str, SIZES))}")


def _share(name: str, value: Any) -> Any:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is None or (number and 0 <= value <= 1):
        return value
    raise UsageError(f"{name} is {value!r}", "give a number from 0 to 1, or leave it out")


def _drop(name: str, value: Any) -> Any:
    """A fraction of the metric's range: 0.005, or 0.5% in words."""
    text = value.strip() if isinstance(value, str) else ""
    try:
        if text.endswith("%"):
            value = float(text[:-1]) / 100
        elif text:
            value = float(text)
        return _share(name, value)
    except (ValueError, UsageError) as error:
        raise UsageError(
            f"{name} is {value!r}", "give a fraction, 0.005, or a percentage, 0.5%"
        ) from error


def _name_of(what: str) -> Callable[[str, Any], Any]:
    def check(name: str, value: Any) -> Any:
        if value is None or (isinstance(value, str) and value.strip()):
            return value
        raise UsageError(f"{name} is {value!r}", f"give {what}, or leave it out")

    return check


def _path_of(what: str) -> Callable[[str, Any], Any]:
    def check(name: str, value: Any) -> Any:
        if value is None:
            return None
        if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
            raise UsageError(f"{name} is {value!r}", f"give the path of {what}, or leave it out")
        return os.fspath(value)

    return check


def _check_quantization(config: Config) -> None:
    """Refuse choices that would have no effect, or that need another one."""
    chosen = [
        flag
        for flag in ("calibrate", "smooth", "max_drop", "eval")
        if getattr(config, flag) is not None
    ]
    of_ranges = ["ranges"] if config.ranges != "dynamic" else []
    of_groups = [] if config.group_size == Config.group_size else ["group_size"]
    of_groups += ["rounding"] if config.rounding == "gptq" else []
    row = PRECISIONS[config.precision]
    if chosen and not row.quantized:
        raise UsageError(f"{chosen[0]} has no effect without quantization", "add precision int8")
    if of_ranges and not row.ranges:
        raise UsageError("ranges has no effect without 8-bit layers", "add precision int8")
    if of_groups and not row.groups:
        raise UsageError(f"{of_groups[0]} has no effect without 4-bit layers", "add precision int4")
    needs = {"smooth", "ranges", "rounding"} & {*chosen, *of_ranges, *of_groups}
    if config.calibrate is None and needs:
        raise UsageError(
            f"{min(needs)} needs samples to calibrate on", "name a file with --calibrate"
        )
    if (config.max_drop is None) != (config.eval is None):
        raise UsageError("--max-drop and --eval need each other", "give both")


# One row per field, so that a field without a check cannot be added: from_dict would refuse it.
CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "target": _target,
    "precision": _one_of(PRECISIONS),
    "sparse": _one_of(SPARSE),
    "tune": _one_of(TUNE_EFFORTS),
    "lengths": _lengths,
    "trials": _positive((int,), "a whole number"),
    "timeout": _positive((int, float), "a number of seconds"),
    "runner": _one_of(RUNNERS),
    "rpc_tracker": _name_of("the address HOST:PORT of a tracker"),
    "rpc_key": _name_of("the key of devices"),
    "threads": _positive((int,), "a whole number"),
    "runtime": _one_of(RUNTIMES),
    "runtime_from": _path_of("a wheel or a directory"),
    "libc": _one_of(LIBCS),
    "head": _one_of(HEADS, optional=True),
    "labels": _labels,
    "allow_unused": _flag,
    "trust_remote_code": _flag,
    "output_hidden_states": _flag,
    "output_attentions": _flag,
    "rename": _renamed,
    "tokenizer": _path_of("a directory"),
    "exit_threshold": _share,
    "log_dir": _path_of("a directory"),
    "shipped_log": _flag,
    "cache_dir": _path_of("a directory"),
    "dump_ir": _path_of("a directory"),
    "calibrate": _path_of("a file"),
    "ranges": _one_of(RANGES),
    "group_size": _group_size,
    "rounding": _one_of(ROUNDINGS),
    "smooth": _share,
    "max_drop": _drop,
    "eval": _path_of("a file"),
}
