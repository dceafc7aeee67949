"""The whole program: model in, bundle out. Each stage is a module; this is the order, and the
cache.
"""

from __future__ import annotations

import dataclasses
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from bertile import bundle, cache, exporter, loader, targets
from bertile.config import Config
from bertile.exported import ExportedModel, read
from bertile.progress import Progress
from bertile.targets import Target

SPEED_LENGTH = 128  # tokens of the request that the summary times


def compile(
    model: Any, output: str | Path, config: Config | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Compile MODEL into a bundle at ``output`` and return what the command prints at its end.

    MODEL is what ``bertile compile`` takes, or a transformers model object. Raises BertileError
    with the exit code of its kind; nothing half-written stays behind.
    """
    config, progress = config or Config(), progress or Progress(verbosity=-1)
    loader.set_thread_defaults()  # before TVM is imported and starts its thread pool
    row = targets.resolve(config.target, config.threads)
    exported = export_cached(model, config, progress)
    compiled = _compile_cached(exported, row, config, progress)
    with progress.stage("bundle") as stage:
        path = bundle.copy(compiled, output)
        stage.detail = str(path)
    return _summary(path, row, progress)


def export(
    model: Any, output: str | Path, config: Config | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """The export stage alone: write model.onnx, export.json and the tokenizer to ``output``."""
    config, progress = config or Config(), progress or Progress(verbosity=-1)
    source = export_cached(model, config, progress)
    path = bundle.copy(source.directory, output, marker="export.json")
    return {**read(path).to_json(), "output": str(path), "onnx": str(path / "model.onnx")}


def tune(model: Any, log: Any, row: Target, config: Config, progress: Progress) -> dict[str, Any]:
    """The stages up to tuning; its result is what the log has gained."""
    return _Run(export_cached(model, config, progress), row, config, progress, log).tune()


def export_cached(model: Any, config: Config, progress: Progress | None = None) -> ExportedModel:
    """The exported model, from the cache where the same model was exported before."""
    progress = progress or Progress(verbosity=-1)
    with progress.stage("export") as stage:
        key = cache.key("exporter", exporter.fingerprint(model, config), str(model))
        path, stage.cached = cache.Cache(config.cache_dir).get_or_make(
            key, lambda directory: exporter.export(model, directory, config)
        )
        exported = read(path)
        stage.detail = f"{exported.family}, {exported.head}"
    return exported


def _compile_cached(
    exported: ExportedModel, row: Target, config: Config, progress: Progress
) -> Path:
    """A checked bundle of the exported model, from the cache where nothing has changed."""
    from bertile.tuning_log import TuningLog

    log = TuningLog.open(config.log_dir, progress.say)
    run = _Run(exported, row, config, progress, log)
    if config.tune != "none":
        run.tune()
    decides = dataclasses.replace(config, cache_dir=None, dump_ir=None, log_dir=None)
    key = cache.key("driver", exported.to_json(), dataclasses.asdict(row), decides, log.digest(row))
    if config.dump_ir:
        run.optimized()  # what is asked for is the dump, whether or not the rest is cached
    path, cached = cache.Cache(config.cache_dir).get_or_make(key, run.make)
    if cached:
        for name in ("import", "optimize", "build", "verify"):
            with progress.stage(name) as stage:
                stage.cached = True
    return path / "bundle"


class _Run:
    """The stages between export and bundle; the graph is made once, when it is first needed."""

    def __init__(
        self, exported: ExportedModel, row: Target, config: Config, progress: Progress, log: Any
    ) -> None:
        self.exported, self.row, self.config, self.progress = exported, row, config, progress
        self.log = log
        self._graph: Any = None

    def optimized(self) -> Any:
        if self._graph is None:
            with self.progress.stage("import"):
                from bertile import importer, optimizer, planner

                graph = importer.import_onnx(self.exported)
            with self.progress.stage("optimize") as stage:
                dump = self.config.dump_ir
                graph = optimizer.optimize(
                    graph, *([optimizer.dump_to(Path(dump))] if dump else [])
                )
                self._graph = planner.plan_precision(graph, self.config.precision, self.row)
                stage.detail = f"IR in {dump}" if dump else ""
        return self._graph

    def tune(self) -> dict[str, Any]:
        from bertile import lowering, tuner

        tasks = lowering.tasks(self.optimized())
        with self.progress.stage("tune") as stage:
            result = tuner.tune(tasks, self.log, self.row, self.config, self.progress)
            stage.cached, stage.detail = result["trials"] == 0, result["text"]
        return result

    def make(self, directory: Path) -> None:
        """Fill a directory with the bundle, checked against ONNX Runtime."""
        from bertile import builder, chooser, verifier

        graph = self.optimized()
        with self.progress.stage("build") as stage:
            choose = chooser.Chooser(self.log, self.row, self.progress.say)
            built = builder.build(graph, choose, self.row, directory / "lib.so")
            stage.detail = ", ".join(f"{n} {kind}" for kind, n in count(built.kernels).items())
        with self.progress.stage("verify") as stage:

            def check(path: Path) -> dict[str, Any]:
                found = verifier.checked(path, self.exported, self.row.threads)
                stage.detail = f"at most {found['max_abs_difference']:.1e} from ONNX Runtime"
                return found

            bundle.write(
                _manifest(self, graph, built),
                built.library,
                built.params,
                self.exported.files(),
                directory / "bundle",
                self.config.runtime,
                check,
            )
        built.library.unlink()


def count(kernels: list[dict[str, Any]]) -> dict[str, int]:
    """How many kernels have which provenance."""
    kinds = [kernel["provenance"] for kernel in kernels]
    return {kind: kinds.count(kind) for kind in ("tuned", "nearest", "default", "generic")}


def _manifest(run: _Run, graph: Any, built: Any) -> dict[str, Any]:
    from bertile import optimizer

    exported, row = graph.exported, run.row
    model = {name: getattr(exported, name) for name in ("source", "sha256", "family", "head")}
    config = {k: v for k, v in run.config.to_dict().items() if k not in ("cache_dir", "dump_ir")}
    return {
        "bertile": version("bertile"),
        "entry": "main",
        "model": {**model, "max_length": exported.max_length, "labels": list(exported.labels)},
        "target": {"name": row.name, "arch": row.arch, "features": list(row.features)},
        "lanes": row.lanes,
        "config": {**config, "target": row.name, "log_dir": None},
        "versions": _versions(),
        "inputs": [dataclasses.asdict(spec) for spec in exported.inputs],
        "outputs": _outputs(graph),
        "static": {"batch": exported.batch, "length": exported.length},
        "passes": optimizer.pass_names(),
        "kernels": built.kernels,
        "fallthrough": built.fallthrough,
        "notes": list(exported.notes),
    }


def _outputs(graph: Any) -> list[dict[str, Any]]:
    """Names, dtypes and axes of main's results; the axes of batch and length by name."""
    ret = graph.main.ret_ty
    types = list(ret.fields) if hasattr(ret, "fields") else [ret]
    return [
        {"name": name, "dtype": str(one.dtype), "axes": _axes(graph.exported, name, one.shape)}
        for name, one in zip(graph.exported.outputs, types)
    ]


def _axes(exported: ExportedModel, name: str, shape: Any) -> list[int | str]:
    """Symbolic axes have their names; those of a static model are told by their place and size.

    A static (batch, n) is one vector per sequence, even where n is the length, unless it is a
    logit per token: a pooled output of 128 channels of a model for 128 tokens is no rarity.
    """
    axes: list[int | str] = [int(e) if hasattr(e, "value") else e.name for e in shape]
    if axes and axes[0] == exported.batch:
        axes[0] = "batch"
    per_token = len(axes) > 2 or name in ("start_logits", "end_logits")
    if len(axes) > 1 and axes[1] == exported.length and per_token:
        axes[1] = "length"
    return axes


def _versions() -> dict[str, str]:
    import tvm

    llvm = tvm.get_global_func("target.llvm_version_major", allow_missing=True)
    return {
        "tvm": version("apache-tvm"),
        "tvm_ffi": version("apache-tvm-ffi"),
        "llvm": str(llvm()) if llvm else "unknown",
        "onnx": version("onnx"),
        "python": platform.python_version(),
    }


def _summary(path: Path, row: Target, progress: Progress) -> dict[str, Any]:
    manifest = loader.read_manifest(path)
    length = min(
        manifest["static"]["length"] or SPEED_LENGTH,
        manifest["model"]["max_length"] or SPEED_LENGTH,
    )
    runs_here = set(manifest["target"]["features"]) <= loader.cpu_features()
    return {
        "output": str(path),
        "size_bytes": sum(f.stat().st_size for f in path.rglob("*") if f.is_file()),
        "milliseconds": _milliseconds(path, length, row.threads) if runs_here else None,
        "length": length,
        "threads": row.threads,
        "max_abs_difference": manifest["check"]["max_abs_difference"],
        "kernels": count(manifest["kernels"]),
        "stages": progress.summary(),
    }


def _milliseconds(path: Path, length: int, threads: int) -> float:
    """The median time of one request of that many tokens."""
    with loader.load(path, threads, verify=False) as model:
        ids = np.ones((1, length), np.int64)
        times = []
        while len(times) < 5 or (sum(times) < 1.0 and len(times) < 30):
            began = time.perf_counter()
            model(input_ids=ids)
            times.append(time.perf_counter() - began)
    return float(np.median(times)) * 1e3
