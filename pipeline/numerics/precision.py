"""Says how each linear layer is computed: its precision, the ranges that a quantized one uses, and
what becomes of the zeros in its weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

# What is asked for. On a CPU fp16 is a way to store weights: products are those of float32. tf32 is
# for GPUs alone.
PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "int8")
# Whether zeros in weights are skipped: where that is faster, nowhere, or everywhere.
SPARSE = ("auto", "off", "always")


@dataclass(frozen=True)
class ZerosPlan:
    """What is known of a weight's zeros, and whether they are skipped.

    `pattern` is one of ``sparsity.PATTERNS``, `zeros` the share of elements that are zero, `lanes`
    the share of lanes (as many inputs of one output as the layer's precision multiplies at once)
    that are not. `density` is what the sparse kernel's task says of them, in percent, None where
    the dense kernel is chosen; `why` says what decided.
    """

    pattern: str
    zeros: float
    lanes: float
    density: int | None = None
    why: str = ""


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """How one linear layer is computed. Arrays are float32.

    int8: the weights are symmetric per output channel (s8, |q| <= 127), the input is u8
    asymmetric, x ≈ low + scale q with scale = (high - low) / 255: per token from its own smallest
    and largest value ("dynamic"), or from `low`, `high` where given ("static"). `smooth` (K,): the
    input's channels are multiplied by it before they are quantized, the weight's rows divided by
    it. `why` says why the layer has this precision, where it is not what was asked for. `sparse`
    is None until the choice between the dense and the sparse kernel is made.
    """

    precision: str = "fp32"
    low: float | None = None
    high: float | None = None
    smooth: np.ndarray | None = None
    why: str = ""
    sparse: ZerosPlan | None = None

    @property
    def static(self) -> bool:
        """Whether one range serves all tokens."""
        return self.low is not None


Plan = Mapping[str, LayerPlan]  # by the name of the layer's weight parameter in the Graph
