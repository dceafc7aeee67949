"""Plans how the linear layers of a graph are quantized, and says what that costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bertile import backends
from bertile.base.tables import table
from bertile.config import Config
from bertile.evaluation import datasets
from bertile.evaluation.datasets import Dataset
from bertile.graph import ops
from bertile.graph.graph import Graph
from bertile.graph.rewriting.dataflow import Dataflow
from bertile.numerics.eight_bit import layer_report
from bertile.numerics.precision import PRECISIONS, LayerPlan, Plan
from bertile.quantize import calibration, gptq, max_drop, ranges
from bertile.quantize.observer import Arrays, Observation, Observer, layer_inputs
from bertile.targets.rows import Target

# What a graph whose operators have their precisions answers to the texts of a dataset.
Answers = Callable[[Graph, Dataset], np.ndarray]
NORMALISERS = ("bertile.layer_norm", "bertile.embedding")
SMOOTHED = {"norm", "gated product"}  # kinds of inputs


class Quantizer:
    """Plans for one graph, which must not have the precisions of its operators yet.

    The graph is run on the calibration file, or for a report alone on usual texts, when that is
    first needed, and once.
    """

    def __init__(self, graph: Graph, row: Target, config: Config) -> None:
        self.graph, self.row, self.config = graph, row, config
        self._search: dict[str, Any] = {}  # what --max-drop has measured

    def plan(self, answers: Answers) -> Plan:
        """What the configuration asks for; what the model itself brings goes first.

        With `max_drop`, every plan that is tried is compiled and run by `answers`.
        """
        plan = self._wanted()
        return plan if self.config.max_drop is None else self._kept(plan, answers)

    def _wanted(self) -> Plan:
        if PRECISIONS[self.config.precision].groups:
            return {**self._in_groups(), **self.graph.plan}
        if self.config.ranges == "dynamic" and self.config.smooth is None:
            return self.graph.plan
        smooth = self._smooth()
        seen = self._observed
        if smooth and self.config.ranges != "dynamic":
            seen = self._observer.observe(self._requests, smooth)
        int8_layers = {
            name: LayerPlan("int8", *self._ends(observation), smooth.get(name))
            for name, observation in seen.items()
        }
        return {**int8_layers, **self.graph.plan}

    def _in_groups(self) -> Plan:
        """The plan of a precision whose weights have scales by group."""
        size, smooth = self.config.group_size, self._smooth()
        plan = {
            name: LayerPlan(self.config.precision, smooth=smooth.get(name), group=size)
            for name, _ in layer_inputs(self.graph)
        }
        if self.config.rounding == "nearest":
            return plan
        seen = self._observer.observe(self._requests, smooth, moments=True)
        for name, layer in plan.items():
            w = self.graph.params[name]
            w = w if layer.smooth is None else w / layer.smooth[:, None]
            rounded = gptq.quantize(w, seen.pop(name).moments, size)
            plan[name] = dataclasses.replace(layer, rounded=rounded)
        return plan

    def _kept(self, plan: Plan, answers: Answers) -> Plan:
        """The plan with as many layers in higher precision as `max_drop` takes."""
        exported = self.graph.exported
        dataset = datasets.read(Path(str(self.config.eval)))
        datasets.output_of(exported.head, dataset)  # refused before anything is compiled
        reference = answers(self._planned({}, "fp32"), dataset)

        def score(outputs: np.ndarray) -> float:
            return dataset.score(outputs, reference, exported.labels)

        precision = self.config.precision
        whole = self._planned(plan, precision).plan
        rows = self.report(whole)["layers"]
        search = max_drop.search(
            whole,
            {row["layer"]: row["output dB"] for row in rows if whole[row["layer"]].quantized},
            lambda candidate: score(answers(self._planned(candidate, precision), dataset)),
            baseline=score(reference),
            max_drop=float(self.config.max_drop or 0),
            higher=self._higher(),
        )
        self._search = {
            "metric": dataset.metric,
            "fp32": score(reference),
            "max_drop": self.config.max_drop,
            "tried": [
                {"kept": kept, "in": precision, "score": value}
                for kept, precision, value in search.tried
            ],
        }
        return search.plan

    def _higher(self) -> tuple[str, ...]:
        """What a layer that costs too much is kept in, the fastest first."""
        in_floats = backends.of(self.row).higher_precisions(self.row)
        in_bytes = ("int8",) if PRECISIONS[self.config.precision].groups else ()
        return (*in_bytes, *in_floats)

    def _planned(self, plan: Plan, precision: str) -> Graph:
        """All on dense kernels: those that skip zeros give the same integers."""
        graph = dataclasses.replace(self.graph, plan=plan)
        return backends.of(self.row).plan_layers(graph, precision, self.row, None, "off")

    def report(self, plan: Plan) -> dict[str, Any]:
        """What the manifest says of quantization: the options, and a row for each layer.

        Empty where no layer of `plan` is in 8 bits.
        """
        if not any(layer.quantized for layer in plan.values()):
            return {}
        layers = {name: plan[name] for name in self._observed if name in plan}
        tokens = {name: self._observed[name].rows for name in layers}
        calibrate = self.config.calibrate
        return {
            "calibration": Path(calibrate).name if calibrate else None,
            "ranges": self.config.ranges,
            "smooth": self.config.smooth,
            "layers": layer_report(layers, self.graph.params, tokens),
            **({"accuracy": self._search} if self._search else {}),
        }

    def _ends(self, seen: Observation) -> tuple[float | None, float | None]:
        if self.config.ranges == "dynamic":
            return None, None
        return ranges.choose(seen, self.config.ranges)

    def _smooth(self) -> dict[str, np.ndarray]:
        if self.config.smooth is None:
            return {}
        return {
            name: ranges.smoothing(
                self._observed[name].channels, self.graph.params[name], self.config.smooth
            )
            for name in smoothable(self.graph)
        }

    @cached_property
    def _requests(self) -> list[Arrays]:
        if self.config.calibrate is None:
            return calibration.usual_requests(self.graph.exported)
        return calibration.read_requests(Path(self.config.calibrate), self.graph.exported)

    @cached_property
    def _observer(self) -> Observer:
        return Observer(self.graph, self.row)

    @cached_property
    def _observed(self) -> dict[str, Observation]:
        requests = self._requests  # a bad file is refused before anything is built
        return self._observer.observe(requests)


def smoothable(graph: Graph) -> list[str]:
    """The weights of the layers whose inputs are all normalised, or gated products.

    LayerNorm multiplies each channel anyway, so that there smoothing costs nothing. A gated product
    has channels that are far larger than the others where both of its factors are; nothing behind
    it levels them, and the pass that makes bytes of it multiplies.
    """
    kinds = input_kinds(graph)
    return [name for name in kinds if kinds[name] <= SMOOTHED and name in graph.params]


def input_kinds(graph: Graph) -> dict[str, set[str]]:
    """By the name of a layer's weight, what gives its inputs: "norm", "attention", "gated product"
    or "other".
    """
    flow = Dataflow(graph.main)
    kinds: dict[str, set[str]] = {}
    for binding in flow.bindings:
        if ops.is_call(binding.value, "bertile.dense"):
            x, w = binding.value.args[:2]
            kinds.setdefault(getattr(flow.definition(w), "name", ""), set()).add(_kind(flow, x))
    return kinds


def _kind(flow: Dataflow, x: Any) -> str:
    if flow.is_op(x, *NORMALISERS):
        return "norm"
    if flow.is_op(x, "bertile.attention"):
        return "attention"
    gated = flow.is_op(x, "bertile.dense") and ops.is_gated(flow.definition(x))
    return "gated product" if gated else "other"


def as_text(quantization: Mapping[str, Any]) -> str:
    """What `bertile inspect --quant` prints of a manifest's "quantization"."""
    layers = quantization.get("layers", [])
    if not layers:
        return "no layer is quantized"
    columns = list(layers[0])
    text = table(columns, [[row[name] for name in columns] for row in layers])
    accuracy = quantization.get("accuracy")
    if accuracy is None:
        return text
    tried = [
        f"{trial['score']:.4f} with {trial['kept']} layers in {trial['in']}"
        for trial in accuracy["tried"]
    ]
    return f"{text}\n\n{accuracy['metric']}: {accuracy['fp32']:.4f} in fp32; {'; '.join(tried)}"
