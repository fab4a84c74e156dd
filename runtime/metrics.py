"""What a server has done, for Prometheus and for the page: tokens, times, queue, and experts by layer.

metrics = Metrics(engine, scheduler)
metrics.render()                    # text of /metrics
metrics.snapshot()                  # what the page shows
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily

from moepack.layout.process import resident_set_bytes
from moepack.runtime.completion import Ending
from moepack.runtime.engine import Engine
from moepack.runtime.scheduler import Scheduler

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
RATES = (0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class LayerCounts:
    """Hits and misses of each layer, read off the store's counts from one fetch to the next."""

    def __init__(self, engine: Engine):
        self._store = engine.store
        self.hits = [0] * engine.architecture.num_hidden_layers
        self.misses = [0] * engine.architecture.num_hidden_layers
        self._layer: int | None = None
        self._before = (0, 0)
        self._store.on_fetch = self._note

    def _note(self, layer: int, expert_ids: Sequence[int], in_order: bool) -> None:
        """A fetch begins, so the one before it has ended: what was counted since is its layer's."""
        counts = (self._store.counts.hits, self._store.counts.misses)
        if self._layer is not None and self._layer < len(self.hits):
            self.hits[self._layer] += counts[0] - self._before[0]
            self.misses[self._layer] += counts[1] - self._before[1]
        self._layer, self._before = layer, counts


class Metrics:
    """Counts of one server."""

    def __init__(self, engine: Engine, scheduler: Scheduler):
        self._engine, self._scheduler = engine, scheduler
        self.layers = LayerCounts(engine)
        self.registry = CollectorRegistry()
        common: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("moepack_requests", "Requests by their end.", ["end"], **common)
        for end in ("stop", "length", "tool_calls", "cancelled", "failed", "refused"):
            self.requests.labels(end)
        self._prompt = Counter("moepack_prompt_tokens", "Prompt tokens.", **common)
        self._cached = Counter("moepack_cached_prompt_tokens", "Prompt tokens that a snapshot spared.", **common)
        self._generated = Counter("moepack_generated_tokens", "Generated tokens.", **common)
        self._constrained = Counter("moepack_constrained_tokens", "Tokens chosen under a grammar.", **common)
        self._ttft = Histogram("moepack_ttft_seconds", "Prefill to first token.", buckets=SECONDS, **common)
        self._wait = Histogram("moepack_queue_seconds", "Time in the queue.", buckets=SECONDS, **common)
        self._rate = Histogram("moepack_decode_tokens_per_second", "Decode, by request.", buckets=RATES, **common)
        Gauge("moepack_queue_length", "Requests that wait.", **common).set_function(lambda: scheduler.waiting)
        running = Gauge("moepack_requests_running", "Requests that are being answered.", **common)
        running.set_function(lambda: len(scheduler.running))
        memory = Gauge("moepack_resident_memory_bytes", "Memory of the process.", **common)
        memory.set_function(resident_set_bytes)
        Gauge("moepack_memory_budget_bytes", "Memory it may take.", **common).set(engine.memory_plan.budget_bytes)
        self.registry.register(self)

    def collect(self) -> Any:
        """The expert store's own counts, as Prometheus asks for them."""
        counts = self._engine.store.counts
        yield CounterMetricFamily("moepack_expert_hits", "Experts found in memory.", counts.hits)
        yield CounterMetricFamily("moepack_expert_misses", "Experts read.", counts.misses)
        yield CounterMetricFamily("moepack_read_bytes", "Bytes requested from expert files.", counts.bytes_read)
        yield CounterMetricFamily("moepack_io_wait_seconds", "Time spent waiting for reads.", counts.io_wait_s)

    def count(self, ending: Ending, total_seconds: float) -> None:
        """A request has been answered, so long after it came."""
        stats = ending.stats
        self.requests.labels(ending.finish_reason).inc()
        self._prompt.inc(ending.usage.prompt_tokens)
        self._cached.inc(ending.usage.cached_tokens)
        self._generated.inc(ending.usage.completion_tokens)
        self._constrained.inc(ending.usage.constrained_tokens)
        if stats.ttft_s is not None:
            self._ttft.observe(stats.ttft_s)
        if stats.decode_tok_s is not None:
            self._rate.observe(stats.decode_tok_s)
        self._wait.observe(max(0.0, total_seconds - stats.compute_s - stats.io_wait_s))

    def render(self) -> bytes:
        """All of it as Prometheus reads it."""
        return generate_latest(self.registry)

    def snapshot(self) -> dict[str, Any]:
        """What changes from second to second, for the page: totals, of which it takes differences."""
        counts, jobs = self._engine.store.counts, self._scheduler.running
        return {
            "time": time.monotonic(),
            "bytes_read": counts.bytes_read,
            "io_wait_s": counts.io_wait_s,
            "hits": list(self.layers.hits),
            "misses": list(self.layers.misses),
            "waiting": self._scheduler.waiting,
            "running": len(jobs),
            "prompt_tokens": sum(len(job.prompt_ids) for job in jobs),
            "prefilled": sum(int(job.prefilled) for job in jobs),
            "generated": sum(len(job.generation.token_ids) for job in jobs if job.generation),
            "resident_bytes": resident_set_bytes(),
            "budget_bytes": self._engine.memory_plan.budget_bytes,
        }
