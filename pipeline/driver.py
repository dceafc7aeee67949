"""Runs the whole program, model in, bundle out: each stage is a module; this is the order, and the
cache.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bertile import backends, loader, preflight
from bertile.base import cache, machine, scratch, tvm_alone
from bertile.base.fingerprint import hash_path
from bertile.base.progress import Progress, default_progress
from bertile.bundle import runtime_parts, writer
from bertile.bundle.native_build import SOURCES
from bertile.config import Config, ConfigFields, configured
from bertile.export.cached import export_cached
from bertile.numerics.precision import PRECISIONS
from bertile.onnx.exported import ExportedModel, read
from bertile.targets import rows
from bertile.targets.rows import Target
from bertile.tune.log.tuning_log import TuningLog
from bertile.verify import summary, verifier

if TYPE_CHECKING:
    from typing_extensions import Unpack

LARGE_DROP = 0.1  # of a metric, from which on somebody may have meant percent

# The modules that decide how a bundle comes out, on any kind of machine: its key in the cache
# covers them with all that they import, so that a change of what else there is compiles nothing.
STAGES = (
    "graph.importer",
    "graph.order",
    "quantize.quantizer",
    "lower.lowering",
    "lower.sparse_choice",
    "tune.log.chooser",
    "bundle.writer",
    "bundle.manifest",
    "verify.verifier",
)


def compile(
    model: Any,
    output: str | os.PathLike[str],
    config: Config | None = None,
    progress: Progress | None = None,
    **options: Unpack[ConfigFields],
) -> dict[str, Any]:
    """Compile MODEL into a bundle at ``output`` and return what the command prints at its end.

    MODEL is what ``bertile compile`` takes, or a transformers model object. ``options`` are fields
    of Config, ``precision="int8"``, which go before those of ``config``. Raises BertileError with
    the exit code of its kind; nothing half-written stays behind.
    """
    config, progress = configured(config, options), progress or default_progress()
    loader.set_thread_defaults()  # before TVM is imported and starts its thread pool
    if config.max_drop is not None and config.max_drop > LARGE_DROP:
        points, percent = f"{100 * config.max_drop:g}", f"{config.max_drop:g}%"
        progress.say(f"--max-drop accepts a loss of {points} points of 100; is {percent} meant?")
    row = preflight.compiling(model, output, config)
    exported = export_cached(model, config, progress)
    compiled = _compile_cached(exported, row, config, progress)
    with progress.stage("bundle") as stage:
        path = writer.copy(compiled, Path(output))
        stage.detail = str(path)
    return summary.describe(path, row, progress)


def export(
    model: Any,
    output: str | os.PathLike[str],
    config: Config | None = None,
    progress: Progress | None = None,
    **options: Unpack[ConfigFields],
) -> dict[str, Any]:
    """The export stage alone: write model.onnx, export.json and the tokenizer to ``output``."""
    config, progress = configured(config, options), progress or default_progress()
    preflight.exporting(model, output, config)
    source = export_cached(model, config, progress)
    path = writer.copy(source.directory, Path(output), marker="export.json")
    return {**read(path).to_json(), "output": str(path), "onnx": str(path / "model.onnx")}


def tune(model: Any, log: Any, row: Target, config: Config, progress: Progress) -> dict[str, Any]:
    """The stages up to tuning; its result is what the log has gained."""
    return _Run(export_cached(model, config, progress), row, config, progress, log).tune()


def tasks(
    model: Any, log: Any, row: Target, config: Config, progress: Progress
) -> tuple[Any, dict[Any, Any]]:
    """The kernels that a model calls, counted; those that layers could have in place of theirs."""
    return _Run(export_cached(model, config, progress), row, config, progress, log).tasks()


def _compile_cached(
    exported: ExportedModel, row: Target, config: Config, progress: Progress
) -> Path:
    """A checked bundle of the exported model, from the cache where nothing has changed."""
    log = open_log(config, progress)
    run = _Run(exported, row, config, progress, log)
    row = run.row
    if config.tune in ("quick", "full"):
        run.tune()
    files = {
        name: _content(getattr(config, name)) for name in ("calibrate", "eval", "runtime_from")
    }
    places = dict.fromkeys(
        ("cache_dir", "dump_ir", "log_dir", "rpc_tracker", "rpc_key", "tokenizer")
    )
    decides = dataclasses.replace(config, runner="local", **places, **files)
    surroundings = (hash_path(SOURCES), backends.of(row).surroundings(row))
    inputs = (exported.to_json(), dataclasses.asdict(row), decides, surroundings)

    def key() -> str:
        stages = (*STAGES, *backends.of(row).stages)
        return cache.key("driver", *inputs, log.digest(row), modules=stages)

    if config.dump_ir:
        run.optimized()  # what is asked for is the dump, whether or not the rest is cached
    results = cache.Cache(config.cache_dir)
    if config.tune == "auto" and not results.has(key()):
        run.settle()  # which may change what the log would choose
    path, cached = results.get_or_make(key(), run.make)
    if cached:
        quantize = ("quantize",) if PRECISIONS[config.precision].quantized else ()
        for name in ("import", "optimize", *quantize, "build", "verify"):
            with progress.stage(name) as stage:
                stage.cached = True
    return path / "bundle"


def _content(path: str | None) -> str | None:
    """A file's hash in the place of its path; a missing file is refused where it is read."""
    return hash_path(Path(path)) if path and Path(path).exists() else path


class _Run:
    """The stages between export and bundle; the graph is made once, when it is first needed, and
    its layers are planned again when tuning has measured more.
    """

    def __init__(
        self, exported: ExportedModel, row: Target, config: Config, progress: Progress, log: Any
    ) -> None:
        tvm_alone.load()  # which all that follows imports
        self.exported, self.config, self.progress = exported, config, progress
        self.row = rows.with_lengths(row, config.lengths, exported.max_length)
        self.log, self.backend = log, backends.of(row)
        self._graph: Any = None
        self._planned: Any = None
        self._quantizer: Any = None

    def optimized(self) -> Any:
        """The graph whose layers know their precision and their kind of kernel."""
        if self._planned is None:
            graph, config = self._quantized(), self.config
            choices = (config.precision, self.row, self.log, config.sparse)
            self._planned = self.backend.plan_layers(graph, *choices)
        return self._planned

    def _quantized(self) -> Any:
        """The optimized graph with the plan that the configuration asks for."""
        if self._graph is None:
            with self.progress.stage("import"):
                from bertile.graph import importer, order

                graph = importer.import_onnx(self.exported)
            with self.progress.stage("optimize") as stage:
                dump = self.config.dump_ir
                dumps = [order.dump_to(Path(dump))] if dump else []
                graph = order.optimize(graph, *dumps)
                stage.detail = f"IR in {dump}" if dump else ""
            self._graph = self._with_plan(graph)
        return self._graph

    def _with_plan(self, graph: Any) -> Any:
        from bertile.quantize import quantizer

        self._quantizer = quantizer.Quantizer(graph, self.row, self.config)
        if PRECISIONS[self.config.precision].quantized:
            with self.progress.stage("quantize") as stage:
                plan = self._quantizer.plan(self._answers)
                graph = dataclasses.replace(graph, plan=plan)
                kept = sum(not layer.quantized for layer in plan.values())
                stage.detail = f"{kept} layers kept in higher precision" if kept else ""
        return graph

    def _answers(self, graph: Any, dataset: Any) -> np.ndarray:
        """What the model in the graph's precisions answers to the texts of a dataset."""
        from bertile.evaluation import datasets

        self.backend.must_run(self.row)
        self.progress.status(f"compile, and evaluate on {len(dataset.texts)} texts")
        with scratch.directory() as directory:
            bundle = self._bundle(graph, self._build(graph, Path(directory)), Path(directory))
            return datasets.answers(bundle, dataset, self.row.threads, self._parts)

    def tasks(self) -> tuple[Any, dict[Any, Any]]:
        from bertile.lower import lowering
        from bertile.lower.alternatives import alternatives
        from bertile.tune.log import chooser

        graph = self.optimized()
        task_counts = lowering.tasks(self.backend.forms(graph))
        for task in task_counts:
            chooser.must_fit(task, self.row)
        return task_counts, alternatives(graph)

    def tune(self) -> dict[str, Any]:
        from bertile.tune.search import tuner

        tasks, others = self.tasks()
        with self.progress.stage("tune") as stage:
            arguments = (tasks, self.log, self.row, self.config, self.progress, others)
            result = tuner.tune(*arguments, self.backend.open_runner)
            stage.cached, stage.detail = result["trials"] == 0, result["text"]
        self._planned = None
        return result

    def settle(self) -> None:
        """Where the log has only what another processor measured, measure that and the default."""
        from bertile.tune.search import tuner

        config = self.config
        here = config.rpc_tracker is None and config.runner == "local"
        if not here or not rows.fits(self.row, loader.cpu_features()):
            return
        if tuner.unsettled(self.tasks()[0], self.log, self.row):
            self.tune()

    def make(self, directory: Path) -> None:
        """Fill a directory with the bundle, checked against ONNX Runtime."""
        include = self.config.runtime == "include"
        add = self.backend.runtime(self._parts) if include else None
        graph = self.optimized()
        with self.progress.stage("build") as stage:
            built = self._build(graph, directory)
            stage.detail = summary.in_words(built.kernels)
        with self.progress.stage("verify") as stage:

            def check(path: Path) -> dict[str, Any]:
                verdict = verifier.checked(path, self.exported, self.row, self._parts)
                stage.detail = verifier.as_text(verdict)
                return verdict

            quantization = self._quantizer.report(graph.plan)
            self._bundle(graph, built, directory, check, quantization, add)
        for path in built.files.values():
            path.unlink()

    def _parts(self) -> runtime_parts.RuntimeParts:
        return runtime_parts.find(self.row, self.config.runtime_from, self.config.cache_dir)

    def _build(self, graph: Any, directory: Path) -> Any:
        from bertile.tune.log import chooser

        choose = chooser.Chooser(self.log, self.row, self.progress.say)
        return self.backend.build(graph, choose, self.row, directory, self.config.cache_dir)

    def _bundle(
        self,
        graph: Any,
        built: Any,
        directory: Path,
        check: Callable[[Path], dict[str, Any]] | None = None,
        quantization: dict[str, Any] | None = None,
        add: Callable[[Path], None] | None = None,
    ) -> Path:
        from bertile.bundle import manifest

        return writer.write(
            manifest.describe(graph, built, self.row, self.config, quantization or {}),
            built.files,
            built.params,
            self.exported.files(),
            directory / "bundle",
            add,
            check,
        )


def open_log(config: Config, progress: Progress) -> TuningLog:
    """The log that a configuration reads and writes: what counts as tuned is of this processor, or
    of any where others' devices are measured.
    """
    here = machine.processor() if config.rpc_tracker is None else None
    return TuningLog.open(config.log_dir, progress.say, config.shipped_log, here)


def tune_model(model: Any, config: Config, progress: Progress) -> dict[str, Any]:
    """The tuning stage by itself: export, import and optimize ``model``, then tune its kernels."""

    loader.set_thread_defaults()
    row = preflight.tuning(model, config)
    log = open_log(config, progress)
    result = tune(model, log, row, config, progress)
    return {"log": str(log.directories[-1] / row.log), **result}
