"""Answers for processors: x86-64 and ARM."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bertile.backends.backend import TOLERANCES, NotHere
from bertile.base import machine
from bertile.base.errors import PlatformError
from bertile.targets import rows
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


class CpuBackend:
    """See `Backend`."""

    tolerances = TOLERANCES
    stages = (
        "backends.cpu.builder",
        "backends.cpu.precision_plan",
        "bundle.native_build",
        "run.opener",
    )

    def check(self, config: Config, row: Target) -> None:
        from bertile.backends.cpu import flags

        flags.check(config, row)

    def higher_precisions(self, row: Target) -> tuple[str, ...]:
        from bertile.backends.cpu import precision_plan

        return precision_plan.higher(row)

    def plan_layers(
        self, graph: Graph, precision: str, row: Target, log: TuningLog | None, sparse: str
    ) -> Graph:
        from bertile.backends.cpu import precision_plan

        return precision_plan.plan_layers(graph, precision, row, log, sparse)

    def forms(self, graph: Graph) -> Forms:
        from bertile.lower.forms import Forms

        return Forms(graph)

    def build(
        self, graph: Graph, chooser: Chooser, row: Target, directory: Path, cache_dir: str | None
    ) -> Built:
        from bertile.backends.cpu import builder

        return builder.build(graph, chooser, row, directory / "lib.so")

    def runtime(self, parts: Parts) -> Callable[[Path], None]:
        from bertile.bundle import writer

        runtime = parts()
        return lambda directory: writer.include_runtime(
            directory, runtime.libraries, runtime.native
        )

    def surroundings(self, row: Target) -> Any:
        from bertile.run import opener

        return opener.cannot_run(row)

    def must_run(self, row: Target) -> None:
        from bertile.run import opener

        opener.must_run(row)

    def open(self, directory: Path, threads: int | None, parts: Parts | None, verify: bool) -> Any:
        from bertile.run import opener

        return opener.opened(directory, threads, parts, verify)

    @contextlib.contextmanager
    def open_for_check(
        self, directory: Path, threads: int | None, parts: Parts | None
    ) -> Iterator[tuple[Any, dict[str, str]]]:
        from bertile import loader
        from bertile.bundle import native_build
        from bertile.run import opener, qemu

        row = opener.row_of(loader.read_manifest(directory))
        try:
            opener.must_run(row)
        except PlatformError as error:
            raise NotHere(error.what, error.remedy, opener.cannot_run(row)) from error
        if rows.is_foreign(row) and not (directory / native_build.COMMAND).is_file():
            try:
                (parts or opener.parts_of(directory))()
            except PlatformError as error:  # offline, and nothing but this needs them
                raise NotHere(error.what, error.remedy) from error
        with opener.opened(directory, threads, parts) as model:
            emulated = isinstance(model, qemu.Model)
            yield model, {"emulator": model.name} if emulated else {}

    def runs_here(self, row: Target, check: Mapping[str, Any]) -> bool:
        from bertile.loader import cpu_features

        return rows.fits(row, cpu_features())

    def open_runner(self, row: Target, config: Config) -> Runner:
        from bertile.tune.measure import runners

        return runners.open_runner(row, config)

    def pack(self) -> Any:
        from bertile.tune.archive.cpu_packer import CpuPack

        return CpuPack

    def inspect(
        self,
        directory: Path,
        batch: int,
        length: int | None,
        threads: int | None,
        progress: Progress,
        measure: bool = True,
    ) -> dict[str, Any] | None:
        from bertile.backends.cpu import inspection

        if not measure:
            return None
        return inspection.inspect(directory, batch, length, threads, progress)

    def summary(self, report: Mapping[str, Any]) -> str:
        between = max(0.0, report["between_kernels_ms"])
        lines = [
            f"{report['batch']} x {report['length']} tokens, {report['threads']} threads:"
            f" {report['total_ms']:.2f} ms, of it {between:.2f} ms between"
            f" kernels; peak {report['peak_gflops']:.0f} GFLOP/s",
            machine.busy_sentence(report["busy"]),
        ]
        if any((kernel.get("peak %") or 0) > 100 for kernel in report["kernels"]):
            lines.append("more than 100% of a peak: the machine was slow when that was measured")
        return "\n".join(lines)


backend = CpuBackend()
