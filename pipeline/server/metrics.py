"""Counts and times requests, and shows it to Prometheus under Text Embeddings Inference's names.

An update is an addition in a list, since each request makes a dozen of them; prometheus-client
writes what a scrape asks for.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import (
    CollectorRegistry,
    PlatformCollector,
    ProcessCollector,
    exposition,
)
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric

# TEI's: 35 buckets of seconds, each 1.5 times the last; lengths and sizes by powers of two.
SECONDS = tuple(0.00001 * 1.5**power for power in range(1, 36))
LENGTHS = tuple(float(1 << power) for power in range(16))
SIZES = tuple(float(1 << power) for power in range(13))
TOKENS = tuple(float(1 << power) for power in range(21))
MODEL = "model"  # the label of what belongs to one of several models


class Histogram:
    """How many values are up to each bound, and their sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds, self.total = bounds, 0.0
        self.counts = [0] * (len(bounds) + 1)

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """(bound, values up to it), the last bound infinite."""
        below, rows = 0, []
        for bound, count in zip((*map(repr, self.bounds), "+Inf"), self.counts):
            below += count
            rows.append((bound, below))
        return rows


class ModelMetrics:
    """What is measured of one model. The event loop tells of requests, threads of groups."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()  # of (name, method)
        self.requests = {
            name: Histogram(SECONDS) for name in ("", "tokenization_", "queue_", "inference_")
        }
        self.lengths, self.sizes = Histogram(LENGTHS), Histogram(SIZES)
        self.tokens, self.groups = Histogram(TOKENS), Histogram(SECONDS)
        self.queue_size: Callable[[], int] = int
        self._lock = threading.Lock()

    def request(self, seconds: float, tokenization: float, queue: float, inference: float) -> None:
        """A request was answered; seconds in all, and of its texts on average."""
        requests = self.requests
        requests[""].observe(seconds)
        requests["tokenization_"].observe(tokenization)
        requests["queue_"].observe(queue)
        requests["inference_"].observe(inference)

    def group(self, lengths: Sequence[int], seconds: float) -> None:
        """Texts of so many tokens each ran together."""
        with self._lock:
            self.sizes.observe(len(lengths))
            self.tokens.observe(sum(lengths))
            self.groups.observe(seconds)
            for length in lengths:
                self.lengths.observe(length)


class Metrics:
    """What `/metrics` shows. `in_house` tells how many requests are not answered yet."""

    def __init__(self, in_house: Callable[[], int]) -> None:
        self.models: dict[str, ModelMetrics] = {}
        self.failures: Counter[tuple[str, str]] = Counter()  # of (reason, model)
        self._in_house = in_house
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)

    def of(self, model: str) -> ModelMetrics:
        """The metrics of a model by the name that it is served under."""
        if model not in self.models:
            self.models[model] = ModelMetrics()
        return self.models[model]

    def page(self, accept: str) -> tuple[bytes, str]:
        """What a scrape gets that accepts these types, and its type."""
        write, content_type = exposition.choose_encoder(accept)
        return write(self._registry), content_type

    def describe(self) -> list[Metric]:
        """Nothing: prometheus-client need not know the names before."""
        return []

    def collect(self) -> Iterator[Metric]:
        """What prometheus-client asks for."""
        models = dict(self.models)
        for name, text in _COUNTERS.items():
            # not "counter": to that, prometheus-client's format adds _total, which TEI's has not
            family = Metric(name, text, "unknown")
            for model, metrics in models.items():
                for (counter, method), count in metrics.counts.copy().items():
                    if counter == name:
                        labels = {MODEL: model, **({"method": method} if method else {})}
                        family.add_sample(name, labels, count)
            yield family
        family = Metric("te_request_failure", "Requests without an answer, by reason", "unknown")
        for (reason, model), count in self.failures.copy().items():
            family.add_sample("te_request_failure", {"err": reason, MODEL: model}, count)
        yield family
        for part, text in _DURATIONS.items():
            name = f"te_request_{part}duration"
            yield _histogram(name, text, {m: models[m].requests[part] for m in models})
        for name, (text, attribute) in _SIZES.items():
            yield _histogram(name, text, {m: getattr(models[m], attribute) for m in models})
        sizes = GaugeMetricFamily("te_queue_size", "Texts that wait for the model", labels=[MODEL])
        for model, metrics in models.items():
            sizes.add_metric([model], metrics.queue_size())
        yield sizes
        yield GaugeMetricFamily(
            "bertile_requests_in_house", "Requests that are not answered yet", self._in_house()
        )


_COUNTERS = {
    "te_request_count": "Requests for the model's work",
    "te_request_success": "Requests that were answered",
    "te_embed_count": "Texts to be embedded",
    "te_embed_success": "Texts that were embedded",
    "te_predict_count": "Texts and pairs to be scored",
    "te_predict_success": "Texts and pairs that were scored",
}
_DURATIONS = {
    "": "Seconds from a request's body to its answer",
    "tokenization_": "Seconds in which a request's texts became tokens",
    "queue_": "Seconds that a request's texts waited for the model, on average",
    "inference_": "Seconds that the model took for a request's texts, on average",
}
_SIZES = {
    "te_request_input_length": ("Tokens of a text", "lengths"),
    "te_batch_next_size": ("Texts that ran together", "sizes"),
    "te_batch_next_tokens": ("Tokens that ran together", "tokens"),
    "bertile_batch_duration": ("Seconds that the model took for what ran together", "groups"),
}


def _histogram(name: str, text: str, histograms: dict[str, Histogram]) -> Metric:
    family = HistogramMetricFamily(name, text, labels=[MODEL])
    for model, histogram in histograms.items():
        family.add_metric([model], histogram.buckets(), histogram.total)
    return family
