"""The inputs of linear layers as our own kernels see them, against hooks in torch's model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import programs

from bertile.export import checkpoints
from bertile.graph.importer import import_onnx
from bertile.graph.order import optimize
from bertile.onnx.samples import sample
from bertile.quantize.observer import KEPT_ROWS, Observer, layer_inputs, observe
from bertile.targets import rows as targets

# float32 in another order, through two layers
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


@pytest.fixture(scope="module")
def graph(exported):
    return optimize(import_onnx(exported))


@pytest.fixture(scope="module")
def requests(exported):
    return [
        sample(exported.inputs, batch, length, 0, length) for batch, length in ((3, 37), (2, 5))
    ]


@pytest.fixture(scope="module")
def observer(graph):
    return Observer(graph, targets.resolve("native", threads=1))


@pytest.fixture(scope="module")
def wanted(requests) -> dict[str, np.ndarray]:
    """The input of each of torch's layers, without padding, all requests behind one another."""
    model = checkpoints.load("synthetic:bert-tiny").model
    seen: dict[str, list[np.ndarray]] = {}
    for request in requests:
        mask = request["attention_mask"] != 0

        def keep(name, x, mask=mask):
            seen.setdefault(name, []).append(x[mask] if x.ndim == 3 else x)

        handles = [
            module.register_forward_hook(
                lambda _, x, __, name=name: keep(name, x[0].detach().numpy())
            )
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)
        ]
        with torch.no_grad():
            model(**{name: torch.from_numpy(array) for name, array in request.items()})
        for handle in handles:
            handle.remove()
    return {name: np.concatenate(parts) for name, parts in seen.items()}


LAYERS = [
    f"encoder.layer.{layer}.{part}"
    for layer in (0, 1)
    for part in (
        "attention.self.query",  # Q, K and V are one layer with one input
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    )
] + ["pooler.dense"]


def test_every_layer_is_observed_as_torch_computes_it(graph, observer, requests, wanted):
    observations = observer.observe(requests)
    names = [name for name, _ in layer_inputs(graph)]
    assert list(observations) == names and len(names) == len(LAYERS)
    for name, layer in zip(names, LAYERS):
        observation, x = observations[name], wanted[layer]
        np.testing.assert_allclose((observation.low, observation.high), (x.min(), x.max()), **CLOSE)
        np.testing.assert_allclose(observation.channels, np.abs(x).max(0), **CLOSE)
        assert observation.histogram.counts.sum() == x.size
        np.testing.assert_allclose(
            observation.histogram.counts @ observation.histogram.centers / x.size,
            x.mean(),
            atol=1e-2,
        )


def test_rows_are_tokens_of_all_requests(graph, observer, requests, wanted):
    name = layer_inputs(graph)[0][0]
    rows, x = observer.observe(requests)[name].rows, wanted[LAYERS[0]]
    np.testing.assert_allclose(rows, x, **CLOSE)  # there are fewer than would be left out


def test_rows_are_at_most_so_many(graph, observer, exported):
    many = [sample(exported.inputs, 4, 100, 0, seed) for seed in range(3)]
    observations = observer.observe(many)
    rows = {len(observation.rows) for observation in observations.values()}
    assert rows == {KEPT_ROWS, 12}  # the pooler sees 4 each


def test_smoothed_inputs_are_observed_where_asked_for(graph, observer, requests):
    first, second = (name for name, _ in layer_inputs(graph)[:2])
    factors = np.linspace(0.1, 2, 128).astype("float32")
    plain, smooth = observer.observe(requests), observer.observe(requests, {first: factors})
    np.testing.assert_allclose(smooth[first].channels, plain[first].channels * factors, rtol=1e-6)
    np.testing.assert_allclose(smooth[first].rows, plain[first].rows * factors, rtol=1e-6)
    assert smooth[second].high == plain[second].high


def test_layers_that_share_a_weight_share_an_observation(tmp_path):
    exported = programs.exported_of(programs.MATCHED["a weight that is read twice"], tmp_path)
    graph = optimize(import_onnx(exported))
    names = [name for name, _ in layer_inputs(graph)]
    assert len(set(names)) < len(names)
    request = sample(exported.inputs, 1, 9, 0)
    observations = observe(graph, [request], targets.resolve("native", threads=1))
    assert set(observations) == set(names)
    twice = next(name for name in names if names.count(name) == 2)
    assert observations[twice].histogram.counts.sum() == 2 * 9 * len(observations[twice].channels)
