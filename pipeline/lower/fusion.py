"""Makes loops of the Relax operators that no schedule of ours covers, fused where they fuse."""

from __future__ import annotations

import tvm
from tvm import relax


def fusion(*entries: str) -> list[tvm.transform.Pass]:
    """The passes that make loops of Relax operators, and one of several where they fuse.

    Functions that none of the `entries` calls are dropped; main is one in any case.
    """
    return [
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FoldConstant(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.DeadCodeElimination(["main", *entries]),
    ]
