"""Says how a fused operator's values may lie between two kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """A row: a way to store activations.

    `group` channels share a lane of 32 bits. `writes` is what a task says that stores its result
    so, "" where no kernel does that in the place of float32. With `ranges`, the scale and the low
    end of each token lie beside the values.
    """

    group: int
    writes: str = ""
    ranges: bool = False


KINDS = {
    "fp32": Kind(1),
    "bf16": Kind(2, "to_bf16"),
    "qkv": Kind(2, "to_bf16"),  # bfloat16, V in pairs of tokens
    "int8": Kind(4, ranges=True),
    "int8_static": Kind(4, "to_int8"),
}


@dataclass(frozen=True)
class Form:
    """A row of KINDS; `owner` names the weight whose plan has the range or the smoothing factors,
    if there is one, and `values_from` of "qkv" is V's first channel.
    """

    kind: str = "fp32"
    owner: str = ""
    values_from: int = 0

    @property
    def group(self) -> int:
        """Channels that share a lane."""
        return KINDS[self.kind].group

    @property
    def in_bytes(self) -> bool:
        """Whether a channel is one byte."""
        return self.group == 4

    @property
    def ranges(self) -> bool:
        """Whether the range of each token lies beside the values."""
        return KINDS[self.kind].ranges

    @property
    def writes(self) -> dict[str, Any]:
        """What a task says that stores its result so."""
        word = KINDS[self.kind].writes
        values = {"values_from": self.values_from} if self.values_from else {}
        return {"writes": word, **values} if word else {}


FP32 = Form()
