"""Says how each linear layer is computed: its precision, the ranges that a quantized one uses, and
what becomes of the zeros in its weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

    from bertile.numerics.four_bit import FourBits
    from bertile.schedules.task import Task


class Precision(NamedTuple):
    """A row: a number format that is asked for, and that a layer may be computed in.

    `tolerance` is the largest difference of a model's output at a real token, relative to the
    largest magnitude of the reference output (at least 1); `cosine` the least mean cosine to
    float32 that its rounding explains, where other weights give far less. What is `quantized` is
    multiplied in bytes; `ranges` of those may be fixed for all tokens. `groups` of inputs share a
    scale of 4-bit weights. `share` is what a weight takes of float32's bytes, at least. `peer` is
    what other libraries compute that has no more digits, "" where that is the same format.
    """

    tolerance: float
    cosine: float
    quantized: bool = False
    ranges: bool = False
    groups: bool = False
    share: float = 1.0
    peer: str = ""


# On a CPU fp16 is a way to store weights: products are those of float32. tf32 is for GPUs alone.
PRECISIONS: Mapping[str, Precision] = {
    # float32 sums of a thousand products in another order differ by about 1e-6 a layer
    "fp32": Precision(1e-4, 0.9999),
    "tf32": Precision(0.02, 0.999),
    "fp16": Precision(5e-3, 0.999, share=0.5, peer="fp32"),
    "bf16": Precision(0.05, 0.99, share=0.5),
    "int8": Precision(0.25, 0.7, quantized=True, ranges=True, share=0.25),
    # 18 dB more noise than int8, of which a model of few and random weights shows most
    "int4": Precision(1.25, 0.6, quantized=True, groups=True, share=0.125),
}
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
    it. int4: the same input, always per token; weights of 4 bits in groups of `group` inputs,
    `rounded` where calibration has done that (of the divided rows), else to nearest. `why` says why
    the layer has this precision, where it is not what was asked for, and `slower` is its kernel in
    that, where the log knew it to take longer. `sparse` is None until the choice between the dense
    and the sparse kernel is made. `bounded` (N,) are the scales of int8's weights where these are
    rounded so that a dense kernel may sum products in 16 bits (``schedules.reference.BOUND``).
    """

    precision: str = "fp32"
    low: float | None = None
    high: float | None = None
    smooth: np.ndarray | None = None
    why: str = ""
    slower: Task | None = None
    sparse: ZerosPlan | None = None
    group: int = 32
    rounded: FourBits | None = None
    bounded: np.ndarray | None = None

    @property
    def quantized(self) -> bool:
        """Whether it is computed in bytes."""
        return PRECISIONS[self.precision].quantized

    @property
    def skips_zeros(self) -> bool:
        """Whether it has the sparse kernel."""
        return self.sparse is not None and self.sparse.density is not None

    @property
    def static(self) -> bool:
        """Whether one range serves all tokens."""
        return self.low is not None


Plan = Mapping[str, LayerPlan]  # by the name of the layer's weight parameter in the Graph
