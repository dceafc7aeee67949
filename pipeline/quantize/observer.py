"""Observes what the input of each linear layer looks like over some requests."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tvm
from tvm import relax

from bertile import loader
from bertile.backends.cpu import builder
from bertile.base import scratch
from bertile.base.progress import track
from bertile.graph import ops
from bertile.graph.graph import Graph
from bertile.graph.rewriting.dataflow import Dataflow, normalized
from bertile.numerics.histogram import Histogram
from bertile.schedules import BLOCK_TOKENS
from bertile.targets.rows import Target, of_this_machine
from bertile.tune.log.chooser import Chooser
from bertile.tune.log.tuning_log import TuningLog
from bertile.tune.measure import roofline

Arrays = Mapping[str, np.ndarray]
KEPT_ROWS = 256  # tokens kept of each layer's input, evenly taken from all requests


@dataclass(frozen=True, eq=False)
class Observation:
    """The values of one input x (tokens, K), padding left out.

    `channels` (K,) is the largest |x| of each channel; `rows` (at most KEPT_ROWS, K) are some of
    the tokens as they were; `moments` (K, K) is the sum of x xᵀ, where it was asked for.
    """

    low: float
    high: float
    channels: np.ndarray
    histogram: Histogram
    rows: np.ndarray
    moments: np.ndarray | None = None

    @classmethod
    def of(cls, x: np.ndarray, keep: int = KEPT_ROWS, moments: bool = False) -> Observation:
        """What there is to see in x (tokens, K), of which `keep` rows are kept."""
        chosen = np.unique(np.linspace(0, len(x) - 1, min(keep, len(x))).astype(int))
        return cls(
            float(x.min()),
            float(x.max()),
            np.abs(x).max(0),
            Histogram.of(x),
            x[chosen].copy(),
            x.T @ x if moments else None,
        )

    def with_more(self, other: Observation) -> Observation:
        """Both together."""
        return Observation(
            min(self.low, other.low),
            max(self.high, other.high),
            np.maximum(self.channels, other.channels),
            self.histogram.with_more(other.histogram),
            np.concatenate([self.rows, other.rows])[:KEPT_ROWS],
            None if self.moments is None else self.moments + other.moments,
        )


class Observer:
    """A graph, built so that it gives the inputs of its linear layers instead of its results.

    It is computed in float32 when the graph's operators have no precision yet, and with this
    machine's instructions where it cannot run those of the row.
    """

    def __init__(self, graph: Graph, row: Target) -> None:
        self.names = [spec.name for spec in graph.exported.inputs]
        self.row = row = of_this_machine(row)
        layers = layer_inputs(graph)
        seen = list(dict.fromkeys(var for _, var in layers))
        self.places = [(name, seen.index(var)) for name, var in layers]
        with scratch.directory() as directory:
            library = Path(directory) / "lib.so"
            # kernels of no log: what is computed is the same
            chooser = Chooser(TuningLog([], _ignore), row, _ignore)
            built = builder.build(_giving(graph, seen), chooser, row, library)
            module = tvm.runtime.load_module(str(library))
        self._main = relax.VirtualMachine(module, tvm.cpu())["main"]
        self._params = [tvm.runtime.tensor(value) for value in built.params.values()]

    def observe(
        self, requests: Sequence[Arrays], smooth: Arrays | None = None, moments: bool = False
    ) -> dict[str, Observation]:
        """Run the requests; the observations are by the name of the layer's weight.

        The inputs of a layer in `smooth` are seen multiplied by its factors (K,).
        """
        smooth, observations = smooth or {}, {}
        keep = -(-KEPT_ROWS // max(1, len(requests)))
        for request in track(requests, "calibrate"):
            for name, x in self._inputs(request):
                x = x * smooth[name] if name in smooth else x
                observation = Observation.of(x, keep, moments)
                observations[name] = (
                    observations[name].with_more(observation)
                    if name in observations
                    else observation
                )
        return observations

    def _inputs(self, request: Arrays) -> Iterator[tuple[str, np.ndarray]]:
        """The input (tokens, K) of each layer for one request, without its padding."""
        arrays = [np.ascontiguousarray(request[name]) for name in self.names]
        mask = request.get("attention_mask", np.ones_like(arrays[0]))
        table = loader.token_blocks(mask, BLOCK_TOKENS).astype("int32")
        roofline.use_threads(self.row.threads)
        results = self._main(*map(tvm.runtime.tensor, [*arrays, table]), *self._params)
        values = [tensor.numpy() for tensor in results]
        for name, place in self.places:
            x = values[place]
            yield name, x[mask != 0] if x.shape[:-1] == mask.shape else x.reshape(-1, x.shape[-1])


def observe(graph: Graph, requests: Sequence[Arrays], row: Target) -> dict[str, Observation]:
    """The inputs of every linear layer of an optimized graph, by the name of the layer's weight.

    A request is the model's inputs by name, each (batch, length). Layers that share a weight share
    an observation.
    """
    return Observer(graph, row).observe(requests)


def layer_inputs(graph: Graph) -> list[tuple[str, relax.Var]]:
    """The weight's name and the input of every linear layer, in the order of their computation."""
    flow = Dataflow(graph.main)
    calls = [b.value for b in flow.bindings if ops.is_call(b.value, "bertile.dense")]
    operands = [(flow.definition(call.args[1]), call.args[0]) for call in calls]
    return [(w.name, x) for w, x in operands if isinstance(w, relax.Var)]


def _giving(graph: Graph, seen: Iterable[relax.Var]) -> Graph:
    """The graph with these variables for its results."""
    main = graph.main
    result = relax.Var("observed", relax.TupleType([var.ty for var in seen]))
    blocks = list(main.body.blocks)
    binding = relax.VarBinding(result, relax.Tuple(list(seen)))
    blocks[-1] = type(blocks[-1])([*blocks[-1].bindings, binding])
    body = relax.SeqExpr(blocks, result)
    function = relax.Function(main.params, body, result.ty, True, main.attrs)
    exported = dataclasses.replace(graph.exported, exits=())  # all at once
    return dataclasses.replace(graph.with_main(normalized(function)), plan={}, exported=exported)


def _ignore(_text: str) -> None:
    """An empty log has nothing to warn of."""
