"""Defines what goes from import to build: a Relax module, its weights, and what the model is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np
import tvm
from tvm import relax

from bertile.numerics.precision import Plan
from bertile.onnx.exported import ExportedModel


@dataclass(frozen=True)
class Graph:
    """``main`` of ``mod`` takes the model's inputs, the block table (m, 4), then ``params`` in its
    own order.

    ``params`` maps the name of each weight parameter to its value, ``plan`` that of a linear
    layer's weight to how the layer is computed.
    """

    mod: tvm.IRModule
    params: dict[str, np.ndarray]
    exported: ExportedModel
    plan: Plan = field(default_factory=dict)

    @property
    def main(self) -> relax.Function:
        """The function that is compiled."""
        return self.mod["main"]

    def with_main(self, main: relax.Function) -> Graph:
        """The same graph with another main function."""
        mod = tvm.IRModule(dict(self.mod.functions), attrs=self.mod.attrs)
        mod["main"] = main
        return dataclasses.replace(self, mod=mod)
