"""Gives what any exporter adds to the scores before a softmax one of three canonical forms.

    Where(And(GatherND(Cast(mask), …)), 0, -inf)  →  (1 - Cast(mask)[:, None, None, :]) * -1e29
    Where(mask == 0, -inf, scores)                →  scores + the same
    Where(j <= i & mask, scores, -inf)            →  scores + the same + Cast(j - i > 0) * -1e29
    any other that places alone decide            →  scores + a table of them, cut to the length

A tensor is judged by its values over several random masks and lengths, not by how it is written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import onnx

from bertile.onnx.dependence import dependence
from bertile.onnx.graph import OnnxGraph
from bertile.onnx.probing import Probes, evaluated
from bertile.onnx.shapes import Axes
from bertile.schedules.attention_spec import Reach

# What closes a key, however large the scores are: they are nothing beside it in float32. It is more
# than what kernels add where a sequence has ended (LOWEST), and several of it stay finite.
MASKED = -1e29
CLOSED = -1e3  # what any other mask must reach where it closes a key
SCALED = -500.0  # what ours must still be where the sum of scores and mask is scaled
# What differs by query is looked at in these lengths too: a window shows only in longer sequences.
LENGTHS = (37, 150)
LONGEST = 4096  # and in the model's own limit, up to here
LARGEST = 2048  # positions of a table of what is added to each pair of places


def write_masks(
    graph: OnnxGraph, probes: Probes, axes: Axes, limit: int | None, opset: int
) -> tuple[str, ...]:
    """Replace every mask that keys and places alone decide; return the names of those kept.

    ``limit`` is how many positions the model has, None where nothing limits them.
    """
    masks = _Masks(graph, _Values(graph, probes, axes, limit, opset), axes)
    kinds, producers = dependence(graph), graph.producers()
    for softmax in [node for node in graph.nodes if node.op_type == "Softmax"]:
        name = softmax.input[0]
        while name in producers:
            name = masks.step(producers[name], kinds)
    graph.clean()
    return tuple(masks.kept)


def places_mask(graph: OnnxGraph, reach: Reach) -> str:
    """Add the canonical mask (batch, 1, length, length) of queries that see keys in their reach.

        places = CumSum(Cast(Equal(input_ids, input_ids)))                        1, 2, 3, …
        Cast(Or(Less(key - query, -before), Greater(key - query, behind))) * -1e29

    or one of the comparisons alone. ``passes.fuse_attention`` reads the reach from it.
    """
    add, integers = graph.add, graph.integers
    same = add("Equal", ["input_ids", "input_ids"])
    ones = add("Cast", [same], to=onnx.TensorProto.INT64)
    places = add("CumSum", [ones, graph.constant(np.asarray(1, np.int64))])
    keys, queries = (add("Unsqueeze", [places, integers(1, axis)]) for axis in (2, 3))
    distance = add("Sub", [keys, queries])
    before, behind = reach
    closed = []
    if before is not None:
        closed.append(add("Less", [distance, graph.constant(np.asarray(-before, np.int64))]))
    if behind is not None:
        closed.append(add("Greater", [distance, graph.constant(np.asarray(behind, np.int64))]))
    outside = closed[0] if len(closed) == 1 else add("Or", closed)
    number = add("Cast", [outside], to=onnx.TensorProto.FLOAT)
    return add("Mul", [number, graph.number(MASKED)])


class _Added(NamedTuple):
    """What a node before a softmax does to the scores: adds ``number`` of a tensor's value."""

    name: str
    scores: str
    number: Callable[[np.ndarray], np.ndarray] | None  # None: not known


class _Sample(NamedTuple):
    """What is added to scores (B|1, H|1, S|1, S), where these keys (B, S) are real."""

    real: np.ndarray
    value: np.ndarray

    @property
    def closes(self) -> bool:
        return bool((self.value <= CLOSED).any())

    @property
    def blinds(self) -> bool:
        """Whether a real query sees no key: then numbers that close a key count, and no two ways to
        write a mask are the same.
        """
        closed = (self.value <= CLOSED).all(-1)
        return bool((closed & self.real[:, None, :]).any())

    @property
    def seen(self) -> np.ndarray:
        return self.value == 0

    def shows(self, seen: np.ndarray, padded: bool) -> bool:
        """Say whether each query sees these keys (…, S, S), of them the real ones alone if
        ``padded``; then a query that is padding may also see all or none.
        """
        length = self.real.shape[1]
        expected = np.broadcast_to(seen, (*seen.shape[:-2], length, length))
        if padded:
            expected = expected & self.real[:, None, None, :]
        actual = np.broadcast_to(self.seen, np.broadcast_shapes(self.value.shape, expected.shape))
        right = (actual == expected).all(-1)
        if padded:
            right |= ~self.real[:, None, :] & (actual.all(-1) | ~actual.any(-1))
        return bool(right.all())

    def adds(self, table: np.ndarray, padded: bool) -> bool:
        """Say whether places alone decide what is added, by a table (1, H|1, P, P); if ``padded``
        padded keys are masked too, and queries that are padding do not count.
        """
        length = self.real.shape[1]
        value, table = np.broadcast_arrays(self.value, table[:, :, :length, :length])
        same = (value == table) | ((value <= CLOSED) & (table <= CLOSED))
        if padded:
            same = np.where(self.real[:, None, None, :], same, value <= CLOSED)
            same = same | ~self.real[:, None, :, None]
        return bool(same.all())


class _Values:
    """What tensors of the graph are, for the random batches of the probes and for longer ones."""

    def __init__(
        self, graph: OnnxGraph, probes: Probes, axes: Axes, limit: int | None, opset: int
    ) -> None:
        self.graph, self.probes, self.axes, self.limit = graph, probes, axes, limit
        self.opset = opset
        self._samples: dict[tuple[str, str], list[_Sample] | None] = {}

    def samples(self, added: _Added, key: str) -> list[_Sample] | None:
        """Return what a node adds in each batch, None where that cannot be told. The last sample
        is the longest, and the first of its sequences has no padding.
        """
        if (added.name, key) not in self._samples:
            self._samples[added.name, key] = self._sampled(added)
        return self._samples[added.name, key]

    def _sampled(self, added: _Added) -> list[_Sample] | None:
        values = self._probed(added.name)
        if values is None or added.number is None:
            return None
        samples = [
            self._sample(feed, added, value) for feed, value in zip(self.probes.feeds, values)
        ]
        if None in samples:
            return None
        of_keys = all(sample.value.shape[2] == 1 for sample in samples)
        bias = any(sample.value.any() for sample in samples) and not any(
            sample.closes for sample in samples
        )
        if of_keys or bias or self.graph.is_constant(added.name):
            return samples
        for length in self._lengths(added.name):
            feed = self._feed(length)
            value = self._evaluated(added.name, feed)
            longer = None if value is None else self._sample(feed, added, value)
            if longer is None:
                return None
            samples.append(longer)
        return samples

    def rank(self, name: str) -> int:
        """Return how many axes a tensor has that was sampled."""
        return self._probed(name)[0].ndim

    def _probed(self, name: str) -> list[np.ndarray] | None:
        if self.graph.is_constant(name):
            return [self.graph.array(name)] * len(self.probes.feeds)
        values = self.probes.of(name)
        if values is None:  # made since
            values = [self._evaluated(name, feed) for feed in self.probes.feeds]
        return None if any(value is None for value in values) else values

    def _sample(
        self, feed: dict[str, np.ndarray], added: _Added, value: np.ndarray
    ) -> _Sample | None:
        batch, length = feed["input_ids"].shape
        real = feed.get("attention_mask", np.ones((batch, length))) != 0
        value = added.number(value)
        fits = value.ndim <= 4 and value.shape[-1:] in ((), (1,), (length,))
        value = value.reshape((1,) * (4 - value.ndim) + value.shape) if fits else value
        if not fits or value.shape[0] not in (1, batch) or value.shape[2] not in (1, length):
            return None
        return _Sample(real, value)

    def _lengths(self, name: str) -> list[int]:
        """The lengths beyond those of the probes, up to the longest that the tensor is known in."""
        static = self.axes.static("length")
        if static is not None:
            return [static]
        longest = min(self.limit or LONGEST, LONGEST)
        if self.limit is None and self._evaluated(name, self._feed(longest)) is None:
            fine = max(self.axes.sizes["length"])  # the probes have been there
            while longest - fine > 1:
                middle = (fine + longest) // 2
                if self._evaluated(name, self._feed(middle)) is None:
                    longest = middle
                else:
                    fine = middle
            longest = fine
        return [*(length for length in LENGTHS if length < longest), longest]

    def _feed(self, length: int) -> dict[str, np.ndarray]:
        """Two sequences of that length where the batch allows it: one whole, one with gaps."""
        batch = self.axes.static("batch") or (2 if length <= LARGEST // 2 else 1)
        last = self.probes.feeds[-1]
        feed = {name: np.resize(array, (batch, length)) for name, array in last.items()}
        if "attention_mask" in feed:
            feed["attention_mask"][0] = 1
        return feed

    def _evaluated(self, name: str, feed: dict[str, np.ndarray]) -> np.ndarray | None:
        return evaluated(self.graph, name, feed, self.opset)


class _Masks:
    def __init__(self, graph: OnnxGraph, values: _Values, axes: Axes) -> None:
        self.graph, self.values, self.axes = graph, values, axes
        self.kept: dict[str, None] = {}
        self._canonical: dict[Any, str] = {}  # by what it is of

    def step(self, node: onnx.NodeProto, kinds: dict[str, str]) -> str:
        """Look at one node before a softmax; return the tensor to look at next, "" to stop."""
        light = [name for name in node.input if kinds.get(name) != "heavy"]
        heavy = [name for name in node.input if kinds.get(name) == "heavy"]
        if node.op_type == "Add" and len(light) == 1:
            self._replace(node, _Added(light[0], heavy[0], lambda value: value), "")
        elif node.op_type == "Where" and len(heavy) == 1 and node.input[0] in light:
            number = self._chosen(node, heavy[0])
            self._replace(node, _Added(node.input[0], heavy[0], number), ",".join(node.input[1:]))
        elif node.op_type != "Add" and not self._scales(node, light):
            return ""
        return heavy[0] if heavy else ""

    def _scales(self, node: onnx.NodeProto, light: list[str]) -> bool:
        """Say whether scores are scaled behind their mask, and the mask stays a mask."""
        if node.op_type not in ("Mul", "Div") or len(light) != 1 or light[0] == node.input[0]:
            return False
        if not self.graph.is_constant(light[0]) or self.graph.array(light[0]).size != 1:
            return False
        number = float(self.graph.array(light[0]).item())
        factor = number if node.op_type == "Mul" else 1 / number if number else 0.0
        return MASKED * factor <= SCALED

    def _chosen(
        self, node: onnx.NodeProto, scores: str
    ) -> Callable[[np.ndarray], np.ndarray] | None:
        """Return what turns the condition of a Where into numbers that are added to the scores."""
        other = next(name for name in node.input[1:] if name != scores)
        if not self.graph.is_constant(other):
            return None
        fill = self.graph.array(other).astype(np.float64)
        keep = node.input[1] == scores
        return lambda condition: np.where(condition == keep, 0.0, fill)

    def _replace(self, node: onnx.NodeProto, added: _Added, key: str) -> None:
        scores = self.values.probes.of(added.scores)
        heads = scores is None or scores[0].ndim == 4  # not seen: made since, of four axes
        samples = self.values.samples(added, key) if heads else None
        if samples is None:
            self.kept[added.name] = None
            return
        terms = self._terms(samples)
        if terms is not None:
            total = added.scores
            for term in terms[:-1]:
                total = self.graph.add("Add", [total, term])
            if terms:
                node.CopyFrom(onnx.helper.make_node("Add", [total, terms[-1]], list(node.output)))
            else:
                self.graph.replace(node.output[0], total)
        elif any(sample.closes for sample in samples):
            self.kept[added.name] = None
            self._as_bias(node, added, samples)

    def _terms(self, samples: list[_Sample]) -> list[str] | None:
        """Return canonical tensors whose sum is the same, None where there are none."""
        if not any(sample.value.any() for sample in samples):
            return []
        if self._is_by_key(samples):
            return [self._keys()]
        keys = self._own_keys(samples)
        if keys is not None:
            return [self._once(keys, lambda: self._keys_mask(*keys))]
        finite = not any(sample.closes for sample in samples)
        if finite or any(sample.blinds for sample in samples):
            return None
        return self._by_reach(samples) or self._by_table(samples)

    def _is_by_key(self, samples: list[_Sample]) -> bool:
        """Say whether each value is 0 at real keys and very negative at padded ones."""
        if all(sample.real.all() for sample in samples):
            return False
        for sample in samples:
            value, real = np.broadcast_arrays(sample.value, sample.real[:, None, None, :])
            if (value[real] != 0).any() or not (value[~real] <= CLOSED).all():
                return False
        return True

    def _own_keys(self, samples: list[_Sample]) -> tuple[str, bool] | None:
        """The tensor (B, S) of the graph that says which keys are seen, where it is no input, or
        which are closed, and whether it is of the first kind.

        Sequences that see no key at all do not count; longer ones than the probes' must not tell
        queries apart either, as a window does.
        """
        if any((sample.value != sample.value[:, :1, :1]).any() for sample in samples):
            return None
        probes = self.values.probes
        wanted = []
        for sample in samples[: len(probes.feeds)]:
            of_keys = sample.value[:, :1, :1]
            batch, length = sample.real.shape
            plain = of_keys.shape == (batch, 1, 1, length)
            if not plain or not ((of_keys == 0) | (of_keys <= CLOSED)).all():
                return None
            wanted.append(of_keys[:, 0, 0] == 0)
        if all(seen.all() for seen in wanted):
            return None
        for node in self.graph.nodes:
            for name in node.output:
                values = probes.of(name) if name else None
                for seen in (True, False) if values is not None else ():
                    if _says(values, wanted, seen):
                        return name, seen
        return None

    def _by_reach(self, samples: list[_Sample]) -> list[str] | None:
        """Queries that see all keys from so many before to so many behind their own place."""
        if not all(((sample.value == 0) | (sample.value <= CLOSED)).all() for sample in samples):
            return None
        last = samples[-1]
        query, key = np.nonzero(np.broadcast_to(last.seen, last.value.shape)[0, 0])
        if not len(query):
            return None
        length = last.real.shape[1]
        most = int((query - key).max()), int((key - query).max())
        reach = tuple(None if distance == length - 1 else distance for distance in most)
        for padded in (False, True):
            if all(
                sample.shows(_in_reach(reach, sample.real.shape[1]), padded) for sample in samples
            ):
                keys = [self._keys()] if padded else []
                return [*keys, *([] if reach == (None, None) else [self._places(reach)])]
        return None

    def _by_table(self, samples: list[_Sample]) -> list[str] | None:
        """What is added to a pair of places, however long the sequence is."""
        last, limit = samples[-1], self.axes.static("length") or self.values.limit
        length = last.real.shape[1]
        if length != limit or length > LARGEST or last.value.shape[2:] != (length, length):
            return None
        table = last.value[:1]
        for padded in (False, True):
            if all(sample.adds(table, padded) for sample in samples):
                return [*([self._keys()] if padded else []), self._table(table)]
        return None

    def _table(self, table: np.ndarray) -> str:
        table = np.maximum(table, MASKED).astype(np.float32)
        return self._once(table.tobytes(), lambda: self._cut(table))

    def _cut(self, table: np.ndarray) -> str:
        """Add a constant (1, H|1, P, P), cut to the length of the request."""
        name = self.graph.constant(table, "bias")
        if self.axes.static("length") is None:
            zero, unit = self.graph.integers(0), self.graph.integers(1)
            for axis in (2, 3):
                ends = [zero, self.axes.tensor("length"), self.graph.integers(axis), unit]
                name = self.graph.add("Slice", [name, *ends])
        return name

    def _as_bias(self, node: onnx.NodeProto, added: _Added, samples: list[_Sample]) -> None:
        """Add what a Where puts in the place of scores, so that attention can take it as a bias."""
        plain = all(((sample.value == 0) | (sample.value <= CLOSED)).all() for sample in samples)
        if node.op_type != "Where" or not plain or any(sample.blinds for sample in samples):
            return
        numbers = [
            self.graph.number(0.0 if name == added.scores else MASKED) for name in node.input[1:]
        ]
        rank = self.values.rank(added.name)
        condition = node.input[0]
        if rank < 4:
            missing = self.graph.integers(*range(4 - rank))
            condition = self.graph.add("Unsqueeze", [condition, missing])
        bias = self.graph.add("Where", [condition, *numbers])
        node.CopyFrom(onnx.helper.make_node("Add", [added.scores, bias], list(node.output)))

    def _places(self, reach: Reach) -> str:
        return self._once(reach, lambda: places_mask(self.graph, reach))

    def _keys(self) -> str:
        return self._once("keys", self._keys_mask)

    def _keys_mask(self, keys: str = "attention_mask", seen: bool = True) -> str:
        mask = self.graph.add("Cast", [keys], to=onnx.TensorProto.FLOAT)
        keys = self.graph.add("Unsqueeze", [mask, self.graph.integers(1, 2)])
        if not seen:
            return self.graph.add("Mul", [keys, self.graph.number(MASKED)])
        padded = self.graph.add("Sub", [self.graph.number(1.0), keys])
        return self.graph.add("Mul", [padded, self.graph.number(MASKED)])

    def _once(self, key: Any, make: Callable[[], str]) -> str:
        if key not in self._canonical:
            self._canonical[key] = make()
        return self._canonical[key]


def _says(values: list[np.ndarray], wanted: list[np.ndarray], number: bool) -> bool:
    """Whether a tensor holds this number for the keys that are wanted, and the other for others."""
    for value, keys in zip(values, wanted):
        if value.shape != keys.shape or value.dtype.kind not in "biuf":
            return False
        counts = keys.any(1)
        if (value.astype(np.float64)[counts] != (keys == number)[counts]).any():
            return False
    return True


def _in_reach(reach: Reach, length: int) -> np.ndarray:
    """Which keys a query sees, (S, S)."""
    before, behind = (length if distance is None else distance for distance in reach)
    query, key = np.indices((length, length))
    return (query - key <= before) & (key - query <= behind)
