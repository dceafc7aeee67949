"""Answers for NVIDIA GPUs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bertile.backends.backend import TOLERANCES, NotHere
from bertile.targets.rows import Target

if TYPE_CHECKING:
    from bertile.base.progress import Progress
    from bertile.config import Config
    from bertile.graph.graph import Graph
    from bertile.lower.built import Built
    from bertile.lower.forms import Forms
    from bertile.run.opener import Parts
    from bertile.tune.log.chooser import Chooser
    from bertile.tune.log.tuning_log import TuningLog
    from bertile.tune.measure.runners import Runner

# What crosses memory has so many digits too, in each of up to 24 layers.
TOLERANCES_ON_GPU = {**TOLERANCES, "fp16": 0.02}


class CudaBackend:
    """See `Backend`."""

    tolerances = TOLERANCES_ON_GPU
    stages = ("backends.cuda.builder", "backends.cuda.precision_plan", "run.cuda.opener")

    def check(self, config: Config, row: Target) -> None:
        from bertile.backends.cuda import flags

        flags.check(config, row)

    def higher_precisions(self, row: Target) -> tuple[str, ...]:
        return ("fp16",)

    def plan_layers(
        self, graph: Graph, precision: str, row: Target, log: TuningLog | None, sparse: str
    ) -> Graph:
        from bertile.backends.cuda import precision_plan

        return precision_plan.plan_layers(graph, precision, row)

    def forms(self, graph: Graph) -> Forms:
        from bertile.backends.cuda.forms import GpuForms

        return GpuForms(graph)

    def build(
        self, graph: Graph, chooser: Chooser, row: Target, directory: Path, cache_dir: str | None
    ) -> Built:
        from bertile.backends.cuda import builder

        return builder.build(graph, chooser, row, directory, cache_dir)

    def runtime(self, parts: Parts) -> Callable[[Path], None]:
        from bertile.bundle import writer

        return writer.include_loaders

    def surroundings(self, row: Target) -> Any:
        from bertile.codegen.cuda import compiler
        from bertile.targets import detect

        card = detect.gpu()
        return [card if isinstance(card, str) else card.name, compiler.words()]

    def must_run(self, row: Target) -> None:
        pass  # what is here is seen when a bundle is loaded

    def open(self, directory: Path, threads: int | None, parts: Parts | None, verify: bool) -> Any:
        from bertile import loader

        return loader.load(directory, threads, verify=verify)

    @contextlib.contextmanager
    def open_for_check(
        self, directory: Path, threads: int | None, parts: Parts | None
    ) -> Iterator[tuple[Any, dict[str, str]]]:
        from bertile.run.cuda import opener

        opened = opener.open_model(directory)
        if isinstance(opened, str):
            raise NotHere(opened, "verify the bundle on a machine with the GPU")
        if opener.emulates(opened):
            yield opened, {"emulator": "the emulator of CUDA kernels"}
            return
        with opened as model:
            yield model, {"gpu": model.gpu.name}

    def runs_here(self, row: Target, check: Mapping[str, Any]) -> bool:
        return "gpu" in check

    def open_runner(self, row: Target, config: Config) -> Runner:
        from bertile.tune.measure.cuda import runner

        return runner.open_runner(row, config)

    def pack(self) -> Any:
        from bertile.tune.archive.cuda_packer import CudaPack

        return CudaPack

    def inspect(
        self,
        directory: Path,
        batch: int,
        length: int | None,
        threads: int | None,
        progress: Progress,
        measure: bool = True,
    ) -> dict[str, Any] | None:
        from bertile.backends.cuda import inspection

        return inspection.inspect(directory, batch, length, measure)

    def summary(self, report: Mapping[str, Any]) -> str:
        from bertile.backends.cuda import inspection

        return inspection.summary(report)


backend = CudaBackend()
