"""Builds what observes a model once, for all plans and compiles of that model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from bertile.quantize.observer import Observer


@contextmanager
def built_once() -> Iterator[None]:
    """Quantizers of the same exported model for the same row share their Observer meanwhile.

    An Observer leaves out a graph's plan, so that it is the same one whatever was asked for.
    """
    observers: dict[tuple, Observer] = {}

    def shared(graph, row):
        key = (graph.exported.directory, row)
        if key not in observers:
            observers[key] = Observer(graph, row)
        return observers[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bertile.quantize.quantizer.Observer", shared)
        yield
