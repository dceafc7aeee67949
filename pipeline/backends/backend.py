"""Says what the program asks of a kind of machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from bertile.base.errors import PlatformError
from bertile.numerics.precision import PRECISIONS
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

# As ``Precision.tolerance``, by precision; a backend may have others.
TOLERANCES = {name: precision.tolerance for name, precision in PRECISIONS.items()}


class NotHere(PlatformError):
    """A bundle that nothing on this machine can run; `reason` is why, in some words."""

    def __init__(self, what: str, remedy: str, reason: str | None = None) -> None:
        super().__init__(what, remedy)
        self.reason = reason or what


class Backend(Protocol):
    """A kind of machine.

    Methods import what they need when they are called: nobody who asks one thing of a backend pays
    for its others, and a machine without a compiler can still inspect a bundle.
    """

    tolerances: Mapping[str, float]  # as TOLERANCES
    stages: tuple[str, ...]  # the modules that decide how a bundle comes out, for its cache key

    def check(self, config: Config, row: Target) -> None:
        """Refuse, before anything takes time, what a compile is asked for and cannot do here."""

    def higher_precisions(self, row: Target) -> tuple[str, ...]:
        """What a layer may be computed in that is not worth its place in int8, the best first."""

    def plan_layers(
        self, graph: Graph, precision: str, row: Target, log: TuningLog | None, sparse: str
    ) -> Graph:
        """The graph whose layers know their precision and their kind of kernel."""

    def forms(self, graph: Graph) -> Forms:
        """In which forms the graph's values lie."""

    def build(
        self, graph: Graph, chooser: Chooser, row: Target, directory: Path, cache_dir: str | None
    ) -> Built:
        """Choose knobs, lower and compile, into files of ``directory``."""

    def runtime(self, parts: Parts) -> Callable[[Path], None]:
        """What puts the runtime into a bundle; what it copies is found now, before a long build."""

    def surroundings(self, row: Target) -> Any:
        """What beside Python modules decides how a bundle is made and checked here."""

    def must_run(self, row: Target) -> None:
        """PlatformError with the reason where a bundle for `row` cannot be run here."""

    def open(
        self, directory: Path, threads: int | None, parts: Parts | None, verify: bool
    ) -> AbstractContextManager[Any]:
        """The bundle, to be called with arrays by input name; PlatformError where it cannot run."""

    def open_for_check(
        self, directory: Path, threads: int | None, parts: Parts | None
    ) -> AbstractContextManager[tuple[Any, dict[str, str]]]:
        """A model that a check calls, and what the check says of who ran it: "gpu", or "emulator",
        which gets small requests. NotHere where nothing here can run it.
        """

    def runs_here(self, row: Target, check: Mapping[str, Any]) -> bool:
        """Whether a bundle with that check can be timed on this machine."""

    def open_runner(self, row: Target, config: Config) -> Runner:
        """Who answers how long a candidate takes; PlatformError where that cannot be."""

    def pack(self) -> Any:
        """What fills an archive of candidates, to be measured where no network reaches."""

    def inspect(
        self,
        directory: Path,
        batch: int,
        length: int | None,
        threads: int | None,
        progress: Progress,
        measure: bool = True,
    ) -> dict[str, Any] | None:
        """What the kernels of a bundle are and take, by a request of "batch" sequences of "length"
        tokens (None: as many as are usual): always "kernels", and with "total_ms" and
        "peak_gflops" where they were measured on this machine. None where nothing is known without
        measuring.
        """

    def summary(self, report: Mapping[str, Any]) -> str:
        """The line below the table of an inspection."""
