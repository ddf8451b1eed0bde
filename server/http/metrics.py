"""Prometheus metrics under the names that gateways, autoscalers and dashboards already read.

Owns the registry of one API server. Names, labels and buckets are those of vLLM, so that existing
panels work. Invariant: label values from clients are bounded in number and length.
"""

from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from diptych.engine.core.types import FinishReason
from diptych.server.client import EngineClient
from diptych.server.http.engine_metrics import EngineCollector

TTFT_BUCKETS: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
ITL_BUCKETS: Final = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
LATENCY_BUCKETS: Final = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_LABELS: Final = ("model_name", "engine")
_FIELD_NAMES_MAX: Final = 32  # distinct unknown fields that get a label of their own
_FIELD_CHARS_MAX: Final = 48


def token_buckets(most: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50 ... up to `most`."""
    buckets: list[float] = []
    scale = 1
    while True:
        for step in (1, 2, 5):
            if step * scale > most:
                return tuple(buckets)
            buckets.append(float(step * scale))
        scale *= 10


class Metrics:
    """What this API server saw itself; the engine's own sums are read at each scrape."""

    def __init__(self, model_name: str, client: EngineClient) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name, "engine": "0"}
        self._fields: set[str] = set()
        tokens = token_buckets(client.info.max_model_len)
        few = (1.0, 2.0, 5.0, 10.0, 20.0)
        histogram = self._histogram
        self.ttft = histogram(
            "time_to_first_token_seconds", "Arrival to first token.", TTFT_BUCKETS
        )
        self.itl = histogram("inter_token_latency_seconds", "Between tokens.", ITL_BUCKETS)
        self.tpot = histogram(
            "request_time_per_output_token_seconds", "Mean per request.", ITL_BUCKETS
        )
        self.e2e = histogram("e2e_request_latency_seconds", "Arrival to end.", LATENCY_BUCKETS)
        self.queue = histogram(
            "request_queue_time_seconds", "Waiting for a worker.", LATENCY_BUCKETS
        )
        self.prefill = histogram(
            "request_prefill_time_seconds", "On a worker until the first token.", LATENCY_BUCKETS
        )
        self.decode = histogram(
            "request_decode_time_seconds", "First token to last.", LATENCY_BUCKETS
        )
        self.inference = histogram(
            "request_inference_time_seconds", "Arrival to last token.", LATENCY_BUCKETS
        )
        self.prompt_len = histogram("request_prompt_tokens", "Per request.", tokens)
        self.generation_len = histogram("request_generation_tokens", "Per choice.", tokens)
        self.generation_len_max = histogram(
            "request_max_num_generation_tokens", "Longest choice of a request.", tokens
        )
        self.params_n = histogram("request_params_n", "Parameter n.", few)
        self.params_max_tokens = histogram("request_params_max_tokens", "Resolved.", tokens)
        self.preemptions = histogram("request_num_preemptions", "Per request.", (0.0, *few))
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens accepted.")
        self.prompt_cached = self._counter("prompt_tokens_cached", "Found in the prefix cache.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens delivered.")
        self.num_generated = 0
        self._success = self._family("request_success", "Choices ended.", "finished_reason")
        for reason in FinishReason:
            self._success.labels(**self._labels, finished_reason=reason.value)
        self._rejections = self._family("admission_rejections", "Answered with 429.", "reason")
        self._rejections.labels(**self._labels, reason="queue_full")
        self._unknown = Counter(
            "diptych:unknown_fields",
            "Request fields that nobody knows.",
            ("field",),
            registry=self.registry,
        )
        self.stalled = Counter(
            "diptych:stalled_streams", "Streams that nobody read.", registry=self.registry
        )
        self._http = Counter(
            "diptych:http_responses", "Responses.", ("path", "status"), registry=self.registry
        )
        self.registry.register(EngineCollector(self._labels, client, lambda: self.num_generated))
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    def render(self) -> bytes:
        return generate_latest(self.registry)

    def generated(self, num_tokens: int) -> None:
        self.num_generated += num_tokens
        self._generation_tokens.inc(num_tokens)

    def rejected(self, reason: str) -> None:
        self._rejections.labels(**self._labels, reason=reason).inc()

    def finished(self, reason: FinishReason) -> None:
        self._success.labels(**self._labels, finished_reason=reason.value).inc()

    def responded(self, path: str, status: int) -> None:
        self._http.labels(path=path, status=str(status)).inc()

    def unknown_field(self, name: str) -> None:
        """Beyond a number of distinct names they share one label."""
        name = name[:_FIELD_CHARS_MAX]
        if name not in self._fields:
            if len(self._fields) >= _FIELD_NAMES_MAX:
                name = "other"
            self._fields.add(name)
        self._unknown.labels(field=name).inc()

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        family = Histogram(f"vllm:{name}", text, _LABELS, buckets=buckets, registry=self.registry)
        return family.labels(**self._labels)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"vllm:{name}", text, _LABELS, registry=self.registry).labels(**self._labels)

    def _family(self, name: str, text: str, label: str) -> Counter:
        return Counter(f"vllm:{name}", text, (*_LABELS, label), registry=self.registry)
