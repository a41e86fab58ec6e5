"""Counters and times of a server, for Prometheus."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from sparselet.serving.request import Output
from sparselet.serving.service import Service

LATENCY_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class ServingMetrics:
    """The metrics of one service. Labels are names in the registry, `base` and `merge`, never text of clients."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineMetrics(service))
        self.requests = self._counter("requests", "Requests by HTTP status.", "status")
        self.tokens = self._counter("tokens", "Tokens of answered requests.", "kind")
        self.first_token = self._histogram("time_to_first_token_seconds", "From a request to its first token.")
        self.per_token = self._histogram("time_per_token_seconds", "From a token to the next, mean of an answer.")

    def answered(self, label: str, prompt_tokens: int, output: Output) -> None:
        """Count an answer."""
        self.tokens.labels(label, "prompt").inc(prompt_tokens)
        self.tokens.labels(label, "completion").inc(len(output.tokens))
        self.first_token.labels(label).observe(output.waited)
        if len(output.tokens) > 1:
            self.per_token.labels(label).observe(output.seconds / (len(output.tokens) - 1))

    def text(self) -> bytes:
        """All metrics in Prometheus' format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, label: str) -> Counter:
        return Counter(f"sparselet_{name}", text, ["expert", label], registry=self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"sparselet_{name}", text, ["expert"], registry=self.registry, buckets=LATENCY_BUCKETS)


class _EngineMetrics(Collector):
    """What the engine and the merge cache count themselves."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Read when metrics are fetched."""
        engine, merges = self.service.engine, self.service.merges
        for name, text, value in (
            ("swaps", "Experts written into the weights.", engine.counts.swaps),
            ("swap_seconds", "Time of all swaps.", engine.counts.swap_seconds),
            ("steps", "Steps of decoding.", engine.counts.steps),
            ("mixed_steps", "Of these, steps of several experts in one batch.", engine.counts.mixed_steps),
            ("merge_cache_hits", "Requests whose merge was kept.", merges.hits),
            ("merge_cache_misses", "Merges that were computed.", merges.misses),
        ):
            yield CounterMetricFamily(f"sparselet_{name}", text, value=value)
        for name, text, value in (
            ("waiting_requests", "Requests that have not begun.", engine.scheduler.waiting),
            ("running_requests", "Requests that have begun.", engine.running),
            ("cache_tokens", "Tokens that keys and values are kept for.", engine.scheduler.cache_tokens),
            ("merge_cache_bytes", "Bytes of kept merges.", merges.bytes),
            ("experts", "Experts by name.", len(self.service.registry.registrations())),
        ):
            yield GaugeMetricFamily(f"sparselet_{name}", text, value=value)
