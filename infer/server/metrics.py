"""What /metrics tells Prometheus, under the names of vLLM's dashboards."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from infer.engine import Handle, Piece, RunningEngine

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)


class Metrics:
    """Counts of one server. What engines count themselves is read when asked for."""

    def __init__(self, engines: dict[str, RunningEngine]) -> None:
        self._engines = engines
        self._registry = CollectorRegistry()
        options = {"labelnames": ("model_name",), "registry": self._registry}
        self._first = Histogram("vllm:time_to_first_token_seconds", "Time to first token.", buckets=_SECONDS, **options)
        self._each = Histogram(
            "vllm:time_per_output_token_seconds", "Time per token after the first.", buckets=_SECONDS, **options
        )
        self._whole = Histogram("vllm:e2e_request_latency_seconds", "Time of a request.", buckets=_SECONDS, **options)
        self._over = Counter(
            "vllm:request_success",
            "Requests that ended, by reason.",
            labelnames=("model_name", "finished_reason"),
            registry=self._registry,
        )
        self._registry.register(self)

    def watch(self, handle: Handle) -> Callable[[Piece], None]:
        """Takes the time of one request, told each of its pieces."""
        name = next((name for name, engine in self._engines.items() if engine is handle.engine), "")
        began = time.perf_counter()
        first: float | None = None

        def told(piece: Piece) -> None:
            nonlocal first
            now = time.perf_counter()
            if first is None and piece.num_tokens:
                first = now
                self._first.labels(name).observe(now - began)
            if piece.is_over:
                self._whole.labels(name).observe(now - began)
                if first is not None and piece.num_tokens > 1:
                    self._each.labels(name).observe((now - first) / (piece.num_tokens - 1))
                self._over.labels(name, handle.request.answer.finish_reason or "abort").inc()

        return told

    def collect(self) -> Iterable[Metric]:
        gauges = {
            "vllm:num_requests_running": ("Requests that have a row.", lambda x: x.engine.num_running),
            "vllm:num_requests_waiting": ("Requests that wait for one.", lambda x: x.num_waiting),
            "qwen_jax:compiled_programs": ("Programs that have run.", lambda x: len(x.engine.compiled)),
            "vllm:kv_cache_usage_perc": ("Share of the pages that requests hold.", lambda x: x.engine.pool.held),
        }
        counters = {
            "vllm:prompt_tokens": ("Tokens of prompts.", lambda x: x.engine.counts.prompt_tokens),
            "vllm:generation_tokens": ("Tokens of answers.", lambda x: x.engine.counts.answer_tokens),
            "vllm:prefix_cache_queries": ("Tokens looked for.", lambda x: x.engine.counts.prompt_tokens),
            "vllm:prefix_cache_hits": ("Tokens found.", lambda x: x.engine.counts.cached_tokens),
            "vllm:num_preemptions": ("Requests that gave way.", lambda x: x.engine.counts.preemptions),
            "qwen_jax:engine_steps": ("Steps.", lambda x: x.engine.counts.steps),
        }
        for table, family in ((gauges, GaugeMetricFamily), (counters, CounterMetricFamily)):
            for metric, (what, value) in table.items():
                found = family(metric, what, labels=["model_name"])
                for name, engine in self._engines.items():
                    found.add_metric([name], value(engine))
                yield found

    def text(self) -> bytes:
        return generate_latest(self._registry)
