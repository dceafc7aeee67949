"""Runs the graph passes, in the one order that counts. In and out: a Graph; the layout of kernels
is not known here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bertile.graph.graph import Graph
from bertile.graph.passes.collect_quantization import collect_quantization
from bertile.graph.passes.fold_weights import fold_weights
from bertile.graph.passes.fuse_angles import fuse_angles
from bertile.graph.passes.fuse_attention import fuse_attention
from bertile.graph.passes.fuse_dense import fuse_dense
from bertile.graph.passes.fuse_embedding import fuse_embedding
from bertile.graph.passes.fuse_first_token import fuse_first_token
from bertile.graph.passes.fuse_gate import fuse_gate
from bertile.graph.passes.fuse_gelu import fuse_gelu
from bertile.graph.passes.fuse_layer_norm import fuse_layer_norm
from bertile.graph.passes.fuse_qkv import fuse_qkv
from bertile.graph.passes.fuse_rotary import fuse_rotary
from bertile.graph.passes.read_quantization import read_quantization
from bertile.graph.passes.remove_zeros import remove_zeros
from bertile.graph.passes.simplify import simplify

Pass = Callable[[Graph], Graph]

# A phase is what --dump-ir writes one file for.
PHASES: tuple[tuple[str, tuple[Pass, ...]], ...] = (
    ("simplified", (read_quantization, simplify)),
    (
        "fused",
        (
            fuse_layer_norm,
            fuse_gelu,
            fuse_rotary,  # brings positions before the heads, where attention does not see them
            fuse_attention,
            fuse_qkv,  # joins what attention gathered, so after it
            fuse_embedding,  # starts from a LayerNorm that is one operator
            fuse_dense,  # after Q, K and V are one product: it takes every linear layer left
            fuse_gate,  # joins two of those
            fuse_angles,  # needs Q, K and V to be one of those
            fuse_first_token,  # needs to see that its input is one of our operators
        ),
    ),
    # simplify first: layers that share weights (ALBERT) share the joined weight too
    # collect after folding: what a quantized model says of a layer is kept by its folded weight's
    # name; remove last: a constant that it folds is rounded as that layer's range says
    ("folded", (simplify, fold_weights, collect_quantization, remove_zeros)),
)


def optimize(graph: Graph, dump: Callable[[str, Graph], None] = lambda phase, graph: None) -> Graph:
    """Run all passes; ``dump`` is called with the name and the result of each phase."""
    dump("imported", graph)
    for phase, passes in PHASES:
        for apply in passes:
            graph = apply(graph)
        dump(phase, graph)
    return graph


def pass_names() -> list[str]:
    """The passes in the order in which they run, for the manifest."""
    return [apply.__name__ for _, passes in PHASES for apply in passes]


def dump_to(directory: Path) -> Callable[[str, Graph], None]:
    """A ``dump`` that writes ``1-imported.py``, ``2-simplified.py`` … into a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    written: list[str] = []

    def dump(phase: str, graph: Graph) -> None:
        written.append(phase)
        (directory / f"{len(written)}-{phase}.py").write_text(graph.mod.script())

    return dump
