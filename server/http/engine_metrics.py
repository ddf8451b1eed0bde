"""The scheduler's sums as Prometheus families, made at each scrape from the newest `Stats`.

Owns nothing. Invariant: reading changes nothing in the engine.
"""

import time
from collections.abc import Iterator
from itertools import accumulate
from typing import Final

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from diptych.engine.core.messages import Stats
from diptych.engine.core.types import STEP_SIZES, step_size
from diptych.server.client import EngineClient
from diptych.server.http.role_metrics import role_families

_STEP_BUCKETS: Final = (1, *(2**i for i in range(3, STEP_SIZES - 1)))


def steps_family(sizes: list[int], tokens: int, labels: dict[str, str]) -> Metric:
    """Tokens per step. sizes: steps by `step_size`, or none; tokens: in all of them."""
    steps = list(accumulate([*sizes, *[0] * (STEP_SIZES - len(sizes))]))
    buckets = [(repr(float(bound)), steps[step_size(bound)]) for bound in _STEP_BUCKETS]
    family = HistogramMetricFamily(
        "vllm:iteration_tokens_total", "Tokens per step.", labels=list(labels)
    )
    family.add_metric(list(labels.values()), [*buckets, ("+Inf", steps[-1])], tokens)
    return family


class EngineCollector(Collector):
    def __init__(self, labels: dict[str, str], client: EngineClient) -> None:
        self._labels = labels
        self._names = list(labels)
        self._values = list(labels.values())
        self._client = client

    def describe(self) -> list[Metric]:
        """Empty: the registry must not scrape at registration to learn the names."""
        return []

    def collect(self) -> Iterator[Metric]:
        stats = self._client.stats()
        yield from self._gauges(stats)
        yield from self._counters(stats)
        sizes, tokens = ([], 0) if stats is None else (stats.step_sizes, stats.step_tokens)
        yield steps_family(sizes, tokens, self._labels)
        yield from role_families(stats, self._labels)
        yield from self._facts()

    def _gauges(self, stats: Stats | None) -> Iterator[Metric]:
        running = 0 if stats is None else stats.running
        waiting = 0 if stats is None else stats.waiting
        used = 0.0 if stats is None else stats.blocks_used / max(1, stats.blocks_total)
        yield self._gauge("num_requests_running", "Sequences on workers.", running)
        yield self._gauge("num_requests_waiting", "Sequences waiting for a place.", waiting)
        yield self._gauge("kv_cache_usage_perc", "Blocks in use, 0 to 1.", used)
        yield self._gauge("gpu_cache_usage_perc", "Alias of kv_cache_usage_perc.", used)
        yield self._gauge("cpu_cache_usage_perc", "No KV is kept outside the pools.", 0.0)
        yield self._gauge("num_requests_swapped", "Sequences are never swapped.", 0.0)
        rate = 0.0 if stats is None else stats.prefix_hits / max(1, stats.prefix_queries)
        yield self._gauge("gpu_prefix_cache_hit_rate", "Hits over queries, since the start.", rate)
        family = GaugeMetricFamily(
            "vllm:num_requests_waiting_by_reason",
            "Sequences waiting, by reason.",
            labels=[*self._names, "reason"],
        )
        family.add_metric([*self._values, "capacity"], waiting)
        family.add_metric([*self._values, "deferred"], 0)
        yield family

    def _counters(self, stats: Stats | None) -> Iterator[Metric]:
        sums = {
            "vllm:num_preemptions": (0 if stats is None else stats.preemptions),
            "vllm:prefix_cache_queries": (0 if stats is None else stats.prefix_queries),
            "vllm:prefix_cache_hits": (0 if stats is None else stats.prefix_hits),
            "vllm:gpu_prefix_cache_queries": (0 if stats is None else stats.prefix_queries),
            "vllm:gpu_prefix_cache_hits": (0 if stats is None else stats.prefix_hits),
            "diptych:losses": (0 if stats is None else stats.losses),
            "diptych:prefill_tokens": (0 if stats is None else stats.prefill_tokens),
        }
        for name, value in sums.items():
            family = CounterMetricFamily(name, "Since the scheduler started.", labels=self._names)
            family.add_metric(self._values, value)
            yield family

    def _facts(self) -> Iterator[Metric]:
        info = self._client.info
        capacity = info.block_size * info.num_blocks
        facts = {
            "block_size": str(info.block_size),
            "num_gpu_blocks": str(info.num_blocks),
            "kv_cache_size_tokens": str(capacity),
            "kv_cache_max_concurrency": f"{capacity / info.max_model_len:.2f}",
        }
        family = GaugeMetricFamily(
            "vllm:cache_config_info", "Facts of the pool.", labels=[*self._names, *facts]
        )
        family.add_metric([*self._values, *facts.values()], 1)
        yield family
        adapters = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
        lora = GaugeMetricFamily("vllm:lora_requests_info", "Adapters in use.", labels=adapters)
        lora.add_metric(["0", "", ""], time.time())
        yield lora

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"vllm:{name}", text, labels=self._names)
        family.add_metric(self._values, value)
        return family
