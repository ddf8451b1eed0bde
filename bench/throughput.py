"""Prefill and decode speed of one sequence against transformers, same weights, same run.

Both sides alternate; every pair gives one ratio. The read bandwidth of the machine (measured
in the same run) stands beside: a decoded token has to read all weights once.
"""

import argparse
import asyncio
import tempfile
import time
from pathlib import Path
from typing import Final

import torch
from transformers import AutoModelForCausalLM

from bench.kernels import limits
from bench.models import SIZES, write_weights
from bench.record import spread, write
from diptych.engine.core.config import CacheOptions, EngineOptions, ModelOptions
from diptych.engine.core.params import SamplingParams
from diptych.kernels import load
from diptych.server.hosting import Hosted, host_engine

_READ_BYTES: Final = 1 << 30  # far more than the caches hold


async def ours(hosted: Hosted, prompt: list[int], num_out: int, name: str) -> tuple[float, float]:
    """Seconds to the first token, seconds of each later one."""
    params = SamplingParams(temperature=0, max_tokens=num_out, ignore_eos=True)
    start = time.perf_counter()
    times = [time.perf_counter() async for _ in hosted.client.stream(name, prompt, params)]
    return times[0] - start, (times[-1] - times[0]) / (num_out - 1)


@torch.inference_mode()
def theirs(model: torch.nn.Module, prompt: list[int], num_out: int) -> tuple[float, float]:
    start = time.perf_counter()
    output = model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1:].argmax(-1)
    first = time.perf_counter()
    for _ in range(num_out - 1):
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
    return first - start, (time.perf_counter() - first) / (num_out - 1)


async def measure(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    torch.set_num_threads(args.threads)
    level = load("cpp", num_threads=args.threads).level
    bandwidth = limits(level, _READ_BYTES)["read_gb_per_s"] * 1e9
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    options = EngineOptions(
        model=ModelOptions(path=str(folder)),
        cache=CacheOptions(enable_prefix_caching=False),
        prefill=0,
        decode=0,
        mixed=1,
        threads=args.threads,
    )
    hosted = await host_engine(options, inline=True)
    torch.set_num_threads(args.threads)  # the engine's own kernels do not use torch's threads
    prompt = torch.randint(3, 256, (args.input_len,), generator=torch.manual_seed(1)).tolist()
    rows = []
    for pair in range(-1, args.pairs):
        mine = await ours(hosted, prompt, args.output_len, f"run{pair}")
        peer = theirs(model, prompt, args.output_len)
        if pair >= 0:  # the first pair warms up
            rows.append((*mine, *peer))
    await hosted.close()
    decode = [1 / row[1] for row in rows]
    return {
        "size": args.size,
        "threads": args.threads,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "prefill_tokens_per_s": spread([args.input_len / row[0] for row in rows]),
        "prefill_tokens_per_s_transformers": spread([args.input_len / row[2] for row in rows]),
        "prefill_ratio": spread([row[2] / row[0] for row in rows]),
        "decode_tokens_per_s": spread(decode),
        "decode_tokens_per_s_transformers": spread([1 / row[3] for row in rows]),
        "decode_ratio": spread([row[3] / row[1] for row in rows]),
        "read_bandwidth_gb_per_s": bandwidth / 1e9,
        "decode_share_of_read_bandwidth": spread(
            [rate * weight_bytes / bandwidth for rate in decode]
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="bench-360m")
    parser.add_argument("--input-len", type=int, default=512)
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_weights(Path(folder), args.size)
        write(args.out, asyncio.run(measure(Path(folder), args)))


if __name__ == "__main__":
    main()
