"""Numbers about a server for Prometheus, under vLLM's names where they mean the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from trim_plugin.engine.engine import Engine
from trim_plugin.engine.request import Finished

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0)


class Metrics:
    """What a server counts, and what its engine says of itself when somebody asks.

    Args:
        engine: the engine.
        name: the model's name, a label of everything.
    """

    def __init__(self, engine: Engine, name: str) -> None:
        self._engine, self._name = engine, name
        self._registry = CollectorRegistry()
        labels: dict[str, Any] = {"labelnames": ("model_name",), "registry": self._registry}

        def seconds(metric: str, what: str) -> Any:
            return Histogram(metric, what, buckets=SECONDS, **labels).labels(name)

        self._first = seconds("vllm:time_to_first_token_seconds", "From a request's arrival to its first text.")
        self._each = seconds("vllm:time_per_output_token_seconds", "Seconds a text token, over the whole answer.")
        self._whole = seconds("vllm:e2e_request_latency_seconds", "From a request's arrival to its answer's end.")
        self._prompts = Counter("vllm:prompt_tokens", "Text tokens of prompts.", **labels).labels(name)
        self._written = Counter("vllm:generation_tokens", "Text tokens of answers.", **labels).labels(name)
        self._done = Counter(
            "vllm:request_success",
            "Answers, by why they ended.",
            ("model_name", "finished_reason"),
            registry=self._registry,
        )
        self._registry.register(self)

    def first_token(self, seconds: float) -> None:
        """An answer has begun."""
        self._first.observe(seconds)

    def finished(self, finished: Finished, seconds: float) -> None:
        """An answer is complete."""
        self._whole.observe(seconds)
        self._each.observe(seconds / max(1, len(finished.tokens)))
        self._prompts.inc(finished.prompt_tokens)
        self._written.inc(len(finished.tokens))
        self._done.labels(self._name, finished.finish_reason).inc()

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Any]:
        """What the engine says now; called by the registry."""
        stats = self._engine.stats()
        for metric, what, value in (
            ("vllm:num_requests_running", "Requests that are being answered.", stats["running"]),
            ("vllm:num_requests_waiting", "Requests that wait.", stats["waiting"]),
            ("trim_plugin:held_bytes", "Bytes of keys and values that are held.", stats["held_bytes"]),
            ("trim_plugin:picture_bytes", "Bytes of encoded pictures that are held.", stats["picture_bytes"]),
        ):
            gauge = GaugeMetricFamily(metric, what, labels=("model_name",))
            gauge.add_metric([self._name], value)
            yield gauge
        for metric, what, value in (
            ("trim_plugin:pictures_encoded", "Pictures that the vision tower has read.", stats["pictures_encoded"]),
            ("trim_plugin:pictures_reused", "Pictures that were asked about again.", stats["pictures_reused"]),
            ("trim_plugin:requests_read_again", "Requests put back when memory was full.", stats.get("read_again", 0)),
            ("trim_plugin:requests_failed", "Requests that ended in an error.", stats.get("failed", 0)),
        ):
            counter = CounterMetricFamily(metric, what, labels=("model_name",))
            counter.add_metric([self._name], value)
            yield counter
