"""Encodes the texts of a Ray dataset, with a model in each worker."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from bertile.base.errors import UsageError, nearest
from bertile.integrations import bundles
from bertile.loader import available_cores


class Encoder:
    """Puts the vectors of a column of texts beside it, in batches of numpy arrays by name.

    `dataset.map_batches(bertile.ray.Encoder, fn_constructor_args=(DIRECTORY,), …)` makes a worker
    for each place of its pool, which opens the bundle once, on as many cores as Ray gives it
    (`num_cpus=`) unless `threads` says how many. `options` are those of `Embedder.encode`. Raises
    as `bundles.embedder`, in the worker.
    """

    def __init__(
        self,
        bundle: bundles.Bundle,
        column: str = "text",
        output: str = "embedding",
        *,
        threads: int | None = None,
        **options: Any,
    ) -> None:
        self.column, self.output, self.options = column, output, options
        self.model = bundles.embedder(bundle, threads or _cores_of_worker())

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The batch with `output`, (n, d) float32.

        UsageError where there is no such column, and for what is no text in it, as None.
        """
        if self.column not in batch:
            raise UsageError(f"column '{self.column}' is unknown{nearest(self.column, batch)}")
        vectors = self.model.encode(list(batch[self.column]), **self.options)
        return {**batch, self.output: vectors}


def _cores_of_worker() -> int | None:
    """How many cores Ray gave this process; None, for all, outside of a worker."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    try:
        cores = ray.get_runtime_context().get_assigned_resources().get("CPU", 0)
    except AssertionError:  # so Ray answers in the program that started it
        return None
    return max(1, min(int(cores), available_cores())) if cores else None
