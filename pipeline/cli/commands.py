"""Runs the commands: parsed options in, data and a text for a person out."""

from __future__ import annotations

import dataclasses
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

from bertile.base.errors import UsageError
from bertile.base.progress import Progress
from bertile.base.tables import lines, size, table
from bertile.cli import (
    bench as bench_command,
)
from bertile.cli import (
    device as device_command,
)
from bertile.cli import (
    prune as prune_command,
)
from bertile.cli import (
    tune as tune_command,
)
from bertile.config import Config


class Outcome(NamedTuple):
    """What a command prints: `data` with --json, else `text`."""

    data: Any
    text: str
    exit_code: int = 0


def compile(options: Namespace, progress: Progress) -> Outcome:
    """Every stage; ends with size, speed, difference and the origin of the kernels."""
    config = read_config(options)
    if options.dry_run:
        return _plan(options, config)
    from bertile import driver

    summary = driver.compile(options.model, Path(options.output), config, progress)
    return Outcome(summary, compile_text(summary))


def export(options: Namespace, progress: Progress) -> Outcome:
    """The export stage by itself: a directory with model.onnx, export.json and the tokenizer."""
    config = read_config(options)
    if options.dry_run:
        return _plan(options, config)
    from bertile import driver

    summary = driver.export(options.model, Path(options.output), config, progress)
    return Outcome(summary, lines(summary))


def prune(options: Namespace, progress: Progress) -> Outcome:
    """Set the smallest weights of a model to zero and write it as a Hugging Face directory."""
    return Outcome(*prune_command.run(options, progress))


def tune(options: Namespace, progress: Progress) -> Outcome:
    """The tuning stage by itself; the log is what stays. Or what the log holds, and no tuning."""
    config = read_config(options)
    if options.list or options.best or options.merge:
        return _tuning_log(options, config, progress)
    if options.ingest:
        counts = tune_command.ingest(options, config, progress)
        return Outcome(counts, "\n\n".join(map(lines, counts)))
    if options.model is None:
        raise UsageError("there is no MODEL to tune", "name one, or give --list, --best or --merge")
    if config.tune == "none":
        config = dataclasses.replace(config, tune="quick")
    if options.dry_run:
        return _plan(options, config)
    if options.pack:
        summary = tune_command.pack(options, config, progress)
        return Outcome(summary, lines(summary))
    from bertile import driver

    summary = driver.tune_model(options.model, config, progress)
    return Outcome(summary, lines(summary))


def verify(options: Namespace, progress: Progress) -> Outcome:
    """Compare with ONNX Runtime; exit code 4 where the difference is past the tolerance."""
    from bertile.run import opener
    from bertile.verify import verifier

    bundle, source = Path(options.bundle), read_config(options).runtime_from
    check = verifier.verify(
        bundle, options.onnx, options.threads, progress, opener.parts_of(bundle, source)
    )
    close = check["max_abs_difference"] <= check["tolerance"]
    verdict = "equal" if close else "DIFFERENT"
    text = (
        f"{verdict}: at most {check['max_abs_difference']:.2g} from {check['reference']}"
        f" (tolerance {check['tolerance']:.2g})"
        + (f", run by {check['emulator']}" if "emulator" in check else "")
    )
    return Outcome(check, text, 0 if close else 4)


def bench(options: Namespace, progress: Progress) -> Outcome:
    """Time bundles or models and their peers in turn on the same inputs."""
    return Outcome(*bench_command.run(options, read_config(options), progress))


def report(options: Namespace, progress: Progress) -> Outcome:
    """Write one HTML page about a bundle's kernels and tuning, or about a tuning log."""
    from bertile.report import collector as writer

    config = read_config(options)
    summary = writer.write(
        Path(options.source),
        Path(options.output),
        measure=not options.no_measure,
        log_dir=config.log_dir,
        batch=options.batch,
        length=options.length,
        threads=config.threads,
        progress=progress,
    )
    return Outcome(summary, lines(summary))


def run(options: Namespace, progress: Progress) -> Outcome:
    """Texts in; vectors with their similarities, or labels with their scores, out."""
    from bertile.run import texts as runner

    texts = options.texts or [line for line in sys.stdin.read().splitlines() if line.strip()]
    if not texts:
        raise UsageError("there is no text", "give texts as arguments or as lines on stdin")
    result = runner.run(
        Path(options.bundle), texts, truncate=options.truncate, threads=options.threads
    )
    return Outcome(result, runner.as_text(result))


def inspect(options: Namespace, progress: Progress) -> Outcome:
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
    rows = [[kernel.get(name) for name in columns] for kernel in kernels]
    fallen = report.get("fallthrough", [])
    text = table([name.replace("_", " ") for name in columns], rows) if rows else "no kernels"
    if rows:
        text += f"\n\n{backend.summary(report)}"
    if fallen:
        text += f"\nfell through to the generic path: {', '.join(fallen)}"
    return Outcome(report, text)


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


def targets(options: Namespace, progress: Progress) -> Outcome:
    """Every row, and which of them this machine can run."""
    from bertile.loader import cpu_features
    from bertile.targets import detect
    from bertile.targets.rows import TABLE, fits, native
    from bertile.targets.table import as_text

    features, card = cpu_features(), detect.gpu()
    runs = [row.name for row in TABLE if fits(row, features)]
    runs += [] if isinstance(card, str) else [row.name for row in detect.rows(card)]
    data = [dataclasses.asdict(row) | {"here": row.name in runs} for row in TABLE]
    return Outcome(data, as_text(runs, native().name if runs else None))


def device(options: Namespace, progress: Progress) -> Outcome:
    """Serve this machine as a device, list a tracker's devices, or be the tracker."""
    return Outcome(*device_command.run(options, progress))


def doctor(options: Namespace, progress: Progress) -> Outcome:
    """Exit code 3 where something keeps Bertile from working here."""
    from bertile.cli import doctor as examination

    checks = examination.examine(cache_directory(options.cache_dir))
    blocked = any(check.status == "fails" for check in checks)
    data = [dataclasses.asdict(check) for check in checks]
    return Outcome(data, examination.as_text(checks), 3 if blocked else 0)


def demo(options: Namespace, progress: Progress) -> Outcome:
    """Compile minilm, compare sentences with it, time it beside ONNX Runtime."""
    config = read_config(options)
    if options.dry_run:
        options.model = "minilm"
        return _plan(options, config)
    from bertile.cli import demo as demonstration

    result = demonstration.demo(Path(options.output), config, progress)
    return Outcome(result, demonstration.as_text(result))


def read_config(options: Namespace) -> Config:
    """The Config of --config, overridden by the flags that were given; saved by --save-config."""
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


def compile_text(summary: dict[str, Any]) -> str:
    """The table that ends a compile."""
    kernels = ", ".join(f"{count} {origin}" for origin, count in summary["kernels"].items())
    rows = {
        "bundle": summary["output"],
        "size": size(summary["size_bytes"]),
        "speed": "not measured: the bundle is for another machine"
        if summary["milliseconds"] is None
        else f"{summary['milliseconds']:.2f} ms for {summary['length']} tokens,"
        f" {summary.get('gpu') or str(summary['threads']) + ' threads'}",
        "difference": summary["check"],
        "kernels": kernels,
    }
    return lines(rows)


def _tuning_log(options: Namespace, config: Config, progress: Progress) -> Outcome:
    from bertile.tune.log import log_commands
    from bertile.tune.log.tuning_log import TuningLog

    if options.model is not None:
        raise UsageError(f"'{options.model}' is one argument too many", "the log is no model's")
    log = TuningLog.open(config.log_dir, progress.say, config.shipped_log)
    if options.merge:
        summary = log_commands.merge(log, list(map(Path, options.merge)), progress)
        return Outcome(summary, lines(summary))
    named = config.target if hasattr(options, "target") else None
    rows = log_commands.best(log, named) if options.best else log_commands.tasks(log, named)
    return Outcome(rows, log_commands.as_text(rows))


def _plan(options: Namespace, config: Config) -> Outcome:
    from bertile.targets.rows import resolve

    row = resolve(config.target, config.threads)
    plan = {
        "command": options.command,
        "model": options.model,
        "output": getattr(options, "output", None),
        "target": row.name,
        "features": " ".join(row.features),
        "threads": row.threads,
    }
    rest = {name: value for name, value in config.to_dict().items() if name not in plan}
    return Outcome({**plan, "config": config.to_dict()}, lines({**plan, **rest}))
