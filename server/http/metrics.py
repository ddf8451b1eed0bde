"""Prometheus metrics under the names that gateways, autoscalers and dashboards already read.

Owns the registry of one API server. Names, labels and buckets are those of vLLM, so that existing
panels work. Invariants: label values from clients are bounded in number and length; what is counted
here is shown as the sum over all API servers (meters.py).
"""

from typing import Final

from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector, generate_latest

from diptych.engine.core.types import FinishReason
from diptych.server.client import EngineClient
from diptych.server.http.engine_metrics import EngineCollector
from diptych.server.http.meters import Cells, MeterCollector

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
_PATHS: Final = (
    *("/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/detokenize"),
    *("/health", "/ready", "/ping", "/metrics", "/load", "/version", "/server_info", "other"),
)
_STATUSES: Final = (
    *("200", "400", "401", "404", "405", "408", "413", "415", "429", "499", "500", "503", "other"),
)


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
    """What the API servers saw themselves; the engine's own sums are read at each scrape."""

    def __init__(self, model_name: str, client: EngineClient, cells: Cells) -> None:
        self.registry = CollectorRegistry()
        labels = {"model_name": model_name, "engine": "0"}
        meters = MeterCollector(cells, labels)
        self._declare_times(meters)
        self._declare_tokens(meters, token_buckets(client.info.max_model_len))
        self._declare_counts(meters)
        self.registry.register(meters)
        self.registry.register(EngineCollector(labels, client))
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    def _declare_times(self, meters: MeterCollector) -> None:
        histogram, times = meters.histogram, LATENCY_BUCKETS
        self.ttft = histogram(
            "vllm:time_to_first_token_seconds", "Arrival to first token.", TTFT_BUCKETS
        )
        self.itl = histogram("vllm:inter_token_latency_seconds", "Between tokens.", ITL_BUCKETS)
        meters.alias(
            "vllm:time_per_output_token_seconds", "Alias of inter_token_latency.", self.itl
        )
        self.tpot = histogram(
            "vllm:request_time_per_output_token_seconds", "Mean per request.", ITL_BUCKETS
        )
        self.e2e = histogram("vllm:e2e_request_latency_seconds", "Arrival to end.", times)
        self.queue = histogram("vllm:request_queue_time_seconds", "Waiting for a worker.", times)
        self.prefill = histogram(
            "vllm:request_prefill_time_seconds", "On a worker until the first token.", times
        )
        self.decode = histogram("vllm:request_decode_time_seconds", "First token to last.", times)
        self.inference = histogram(
            "vllm:request_inference_time_seconds", "Arrival to last token.", times
        )

    def _declare_tokens(self, meters: MeterCollector, tokens: tuple[float, ...]) -> None:
        histogram, counter = meters.histogram, meters.counter
        few = (1.0, 2.0, 5.0, 10.0, 20.0)
        self.prompt_len = histogram("vllm:request_prompt_tokens", "Per request.", tokens)
        self.generation_len = histogram("vllm:request_generation_tokens", "Per choice.", tokens)
        self.generation_len_max = histogram(
            "vllm:request_max_num_generation_tokens", "Longest choice of a request.", tokens
        )
        self.params_n = histogram("vllm:request_params_n", "Parameter n.", few)
        self.params_max_tokens = histogram("vllm:request_params_max_tokens", "Resolved.", tokens)
        self.preemptions = histogram("vllm:request_num_preemptions", "Per request.", (0.0, *few))
        self.prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens accepted.")
        self.prompt_cached = counter("vllm:prompt_tokens_cached", "Found in the prefix cache.")
        self.generated = counter("vllm:generation_tokens", "Tokens delivered.")

    def _declare_counts(self, meters: MeterCollector) -> None:
        counter = meters.counter
        self._finished = {
            reason: counter("vllm:request_success", "Choices ended.", finished_reason=reason.value)
            for reason in FinishReason
        }
        self._rejected = {
            reason: counter("vllm:admission_rejections", "Overload was answered.", reason=reason)
            for reason in ("queue_full", "connections")
        }
        self.stalled = meters.plain_counter("diptych:stalled_streams", "Streams that nobody read.")
        self._responses = {
            (path, status): meters.plain_counter(
                "diptych:http_responses", "Responses.", path=path, status=status
            )
            for path in _PATHS
            for status in _STATUSES
        }
        self._unknown = meters.named(
            "diptych:unknown_fields", "Request fields that nobody knows.", "field"
        )

    def render(self) -> bytes:
        return generate_latest(self.registry)

    def rejected(self, reason: str) -> None:
        self._rejected[reason].inc()

    def finished(self, reason: FinishReason) -> None:
        self._finished[reason].inc()

    def responded(self, path: str, status: int) -> None:
        known = path if path in _PATHS else "other"
        word = str(status)
        self._responses[known, word if word in _STATUSES else "other"].inc()

    def unknown_field(self, name: str) -> None:
        self._unknown.inc(name)
