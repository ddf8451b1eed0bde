"""vLLM's V1 scheduler alone, without a model: schedule + update per decode step.

Runs under the Python of an environment that has vLLM (`bench.scheduler --vllm-python`), as a file,
and imports nothing of ours. Prefix caching on, blocks of 16 tokens, every request decodes; what a
worker would answer is made beside the clock. Prints one line of JSON.
"""

import json
import statistics
import sys
from time import perf_counter
from typing import Any

BLOCK = 16
NUM_BLOCKS = 1 << 15
STEPS = 160
PROMPT = 8192


def make_scheduler(model: str, max_num_seqs: int) -> Any:
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    config = EngineArgs(
        model=model,
        dtype="bfloat16",
        max_model_len=PROMPT * 2,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=PROMPT * 2,
        block_size=BLOCK,
        enable_prefix_caching=True,
        async_scheduling=False,
        hf_overrides={"max_position_embeddings": PROMPT * 2},
    ).create_engine_config()
    config.cache_config.num_gpu_blocks = NUM_BLOCKS
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=16, dtype=torch.bfloat16)
    layers = KVCacheConfig(
        num_blocks=NUM_BLOCKS,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
    )
    structured = StructuredOutputManager(config)
    return Scheduler(
        vllm_config=config,
        kv_cache_config=layers,
        structured_output_manager=structured,
        block_size=BLOCK,
    )


class Driver:
    def __init__(self, model: str, max_num_seqs: int) -> None:
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(BLOCK, sha256)
        self.scheduler = make_scheduler(model, max_num_seqs)

    def request(self, name: str, prompt: list[int], max_tokens: int) -> Any:
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        return Request(name, prompt, params, None, block_hasher=self.hasher)

    def step(self) -> float:
        """Microseconds of schedule and update."""
        from vllm.v1.outputs import ModelRunnerOutput

        start = perf_counter()
        planned = self.scheduler.schedule()
        scheduled = perf_counter()
        ids = list(planned.num_scheduled_tokens)
        output = ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={name: index for index, name in enumerate(ids)},
            sampled_token_ids=[[7] for _ in ids],
        )
        ran = perf_counter()
        self.scheduler.update_from_output(planned, output)
        return (perf_counter() - ran + scheduled - start) * 1e6


def measure(model: str, num_running: int) -> dict[str, float]:
    driver = Driver(model, num_running)
    added = []
    for index in range(num_running):
        request = driver.request(f"r{index}", [100 + index] * (1 + index % BLOCK), 4096)
        start = perf_counter()
        driver.scheduler.add_request(request)
        added.append((perf_counter() - start) * 1e6)
    for _ in range(4):
        driver.step()
    assert len(driver.scheduler.running) == num_running
    steps = [driver.step() for _ in range(STEPS)]
    return {
        "running": num_running,
        "step_us_p50": round(statistics.median(steps), 1),
        "add_request_us_p50": round(statistics.median(added), 1),
    }


def prefix_lookup(model: str) -> dict[str, float]:
    driver = Driver(model, 8)
    prompt = [i % 250 for i in range(PROMPT)]
    driver.scheduler.add_request(driver.request("first", prompt, 1))
    driver.step()
    hashes, lookups = [], []
    for index in range(30):
        start = perf_counter()
        request = driver.request(f"again{index}", prompt, 1)
        hashes.append((perf_counter() - start) * 1e6)
        start = perf_counter()
        _, found = driver.scheduler.kv_cache_manager.get_computed_blocks(request)[:2]
        lookups.append((perf_counter() - start) * 1e6)
        assert found >= PROMPT - BLOCK, found
    return {
        "prompt_tokens": PROMPT,
        "hash_us_p50": round(statistics.median(hashes), 1),
        "lookup_us_p50": round(statistics.median(lookups), 1),
    }


def main() -> None:
    import vllm

    model, sizes = sys.argv[1], [int(word) for word in sys.argv[2:]]
    result = {
        "version": vllm.__version__,
        "rows": [measure(model, size) for size in sizes],
        "prefix": prefix_lookup(model),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
