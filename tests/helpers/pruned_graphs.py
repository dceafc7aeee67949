"""Sets weights of a graph to zero, and looks at its layers."""

from __future__ import annotations

import dataclasses

import numpy as np

from bertile.graph import ops
from bertile.lower.forms import Forms


def pruned(graph, share=0.9, group=4, names=None):
    """The graph with that share of blocks (inputs of one output) of its linear layers zero."""
    rng = np.random.default_rng(0)
    params = dict(graph.params)
    for name in names or layers(graph):
        w = params[name]
        kept = rng.random((w.shape[0] // group, w.shape[1])) >= share
        params[name] = w * kept.repeat(group, 0).astype("float32")
    return dataclasses.replace(graph, params=params)


def layers(graph):
    """The weights of the linear layers over tokens."""
    flow = Forms(graph).flow
    calls = [b.value for b in flow.bindings if ops.is_call(b.value, "bertile.dense")]
    return list(dict.fromkeys(c.args[1].name for c in calls if flow.is_tokens(c.args[0])))
