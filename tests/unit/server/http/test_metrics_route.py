"""The names that other software reads, and values that follow what happened."""

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from diptych.engine.core.errors import OverloadedError
from diptych.engine.core.messages import Stats, WorkerStats
from diptych.server.http.engine_metrics import steps_family
from diptych.server.http.metrics import token_buckets
from diptych.server.http.role_metrics import role_families
from tests.unit.server.http.conftest import Site

TIER_A = {
    "vllm:num_requests_waiting": 2.0,
    "vllm:num_requests_running": 3.0,
    "vllm:kv_cache_usage_perc": 0.25,
    "vllm:cache_config_info": 1.0,
    "vllm:num_requests_waiting_by_reason": 2.0,
    "vllm:num_preemptions_total": 1.0,
    "vllm:prefix_cache_queries_total": 100.0,
    "vllm:prefix_cache_hits_total": 40.0,
    "vllm:gpu_prefix_cache_queries_total": 100.0,
    "vllm:gpu_prefix_cache_hits_total": 40.0,
    "vllm:gpu_prefix_cache_hit_rate": 0.4,
    "vllm:gpu_cache_usage_perc": 0.25,
    "vllm:cpu_cache_usage_perc": 0.0,
    "vllm:num_requests_swapped": 0.0,
}
ROLES = {
    "diptych:num_workers_leaving": 0.0,
    "diptych:num_workers_wanted": 3.0,
    "diptych:dial_moves_total": 6.0,
    "diptych:workers_asked_total": 2.0,
    "diptych:workers_retired_total": 1.0,
}
HISTOGRAMS = [
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_max_num_generation_tokens",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_inference_time_seconds",
    "iteration_tokens_total",
    "request_params_n",
    "request_params_max_tokens",
    "request_num_preemptions",
]


def scrape(site: Site) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    response = site.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def value(samples: dict, name: str, **labels: str) -> float:  # type: ignore[type-arg]
    found = [
        number
        for (sample, pairs), number in samples.items()
        if sample == name and labels.items() <= dict(pairs).items()
    ]
    assert found, name
    return float(found[0])


def test_roles_and_scaling(site: Site) -> None:
    samples = scrape(site)
    for name, expected in ROLES.items():
        assert value(samples, name, model_name="tiny", engine="0") == expected
    for worker, dial in (("0", 100.0), ("1", 0.0)):
        assert value(samples, "diptych:worker_dial", worker=worker) == dial
    roles = {"prefill": 1.0, "mixed": 0.0, "decode": 1.0}
    for role, count in roles.items():
        assert value(samples, "diptych:num_workers", role=role) == count
    for side, pressure in (("prefill", 0.5), ("decode", 0.25)):
        assert value(samples, "diptych:slo_pressure", side=side) == pressure
    for stage, seconds in (("import", 1.2), ("join", 0.002), ("total", 1.412)):
        assert value(samples, "diptych:cold_start_seconds", stage=stage) == seconds


def test_families_of_roles_are_there_before_the_scheduler_speaks() -> None:
    families = {family.name: family.samples for family in role_families(None, {"engine": "0"})}
    assert {"diptych:worker_dial", "diptych:dial_moves"} < families.keys()
    assert not families["diptych:worker_dial"]
    assert [sample.value for sample in families["diptych:num_workers"]] == [0.0, 0.0, 0.0]


def test_steps_lie_in_the_buckets_of_their_sizes() -> None:
    sizes = [3, 0, 0, 1, 5, 0, 0, 0, 0, 2, 0, 0, 0, 0, 1, 4]  # up to 1, 8, 16, 512, 2^14, more
    family = steps_family(sizes, 99_000, {"engine": "0"})
    found = {s.labels["le"]: s.value for s in family.samples if s.name.endswith("_bucket")}
    expected = {"1.0": 3, "8.0": 4, "16.0": 9, "256.0": 9, "512.0": 11, "16384.0": 12, "+Inf": 16}
    assert {bound: found[bound] for bound in expected} == expected
    assert len(found) == 14
    sums = {s.name: s.value for s in family.samples if not s.name.endswith("_bucket")}
    assert sums == {
        "vllm:iteration_tokens_total_count": 16,
        "vllm:iteration_tokens_total_sum": 99_000,
    }
    assert not any(sample.value for sample in steps_family([], 0, {}).samples)


def test_a_worker_that_does_both_counts_as_mixed() -> None:
    stats = Stats(1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, [], True)
    workers = [WorkerStats(number, 1, dial, 0, 0, 0.0) for number, dial in enumerate((50, 1, 99))]
    found = role_families(msgspec.structs.replace(stats, workers=workers), {})
    (roles,) = (family for family in found if family.name == "diptych:num_workers")
    assert {s.labels["role"]: s.value for s in roles.samples}["mixed"] == 3.0


def test_names_labels_and_buckets(site: Site) -> None:
    samples = scrape(site)
    for name, expected in TIER_A.items():
        assert value(samples, name, model_name="tiny", engine="0") == expected
    assert value(samples, "vllm:lora_requests_info", max_lora="0") > 1e9
    facts = {"block_size": "16", "num_gpu_blocks": "64", "kv_cache_size_tokens": "1024"}
    value(samples, "vllm:cache_config_info", kv_cache_max_concurrency="8.00", **facts)
    for name in HISTOGRAMS:
        value(samples, f"vllm:{name}_bucket", model_name="tiny", engine="0", le="+Inf")
    for name, count in (
        ("time_to_first_token_seconds", 22),
        ("inter_token_latency_seconds", 19),
        ("e2e_request_latency_seconds", 21),
    ):
        bounds = [pairs for (sample, pairs) in samples if sample == f"vllm:{name}_bucket"]
        assert len(bounds) == count + 1
    for reason in ("stop", "length", "abort", "error"):
        assert value(samples, "vllm:request_success_total", finished_reason=reason) == 0
    assert value(samples, "vllm:admission_rejections_total", reason="queue_full") == 0
    assert value(samples, "process_resident_memory_bytes") > 0


def test_values_follow_requests(site: Site) -> None:
    site.engine.num_cached = 4
    site.http.post("/v1/completions", json={"prompt": [5] * 10, "n": 2})
    site.http.post("/v1/completions", json={"prompt": [5] * 10, "max_tokens": 1})
    site.engine.refuse = OverloadedError("full", retry_after_s=1)
    site.http.post("/v1/completions", json={"prompt": [5] * 10})
    samples = scrape(site)
    for name, expected in (
        ("vllm:prompt_tokens_total", 20),
        ("vllm:generation_tokens_total", 7),
        ("vllm:request_prompt_tokens_sum", 20),
        ("vllm:request_prompt_tokens_count", 2),
        ("vllm:request_generation_tokens_count", 3),
        ("vllm:request_max_num_generation_tokens_sum", 4),
        ("vllm:time_to_first_token_seconds_count", 2),
        ("vllm:inter_token_latency_seconds_count", 4),
        ("vllm:e2e_request_latency_seconds_count", 2),
        ("vllm:request_params_n_sum", 3),
        ("vllm:request_params_max_tokens_sum", 17),
    ):
        assert value(samples, name, engine="0") == expected, name
    assert value(samples, "vllm:request_success_total", finished_reason="stop") == 2
    assert value(samples, "vllm:request_success_total", finished_reason="length") == 1
    assert value(samples, "vllm:admission_rejections_total", reason="queue_full") == 1
    path = "/v1/completions"
    assert value(samples, "diptych:http_responses_total", path=path, status="429") == 1


def test_token_buckets() -> None:
    assert token_buckets(50) == (1, 2, 5, 10, 20, 50)
    assert token_buckets(99)[-1] == 50
