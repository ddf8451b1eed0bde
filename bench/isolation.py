"""What running decodes feel of a long prompt: prefill and decode workers against mixed ones.

Four sequences decode while a prompt of 2,048 tokens arrives. Each engine is measured in turn,
round by round, all on the same cores: first the prompt alone, then the decodes alone (quiet), then
both for a fixed time that starts with the prompt (loaded). Gaps between tokens are the client's;
those of the loaded phase count until the prompt's first token. Throughput is that of the whole
loaded phase, prompt and answers together, and that of `--saturated` seconds in which one prompt
follows another.
"""

import argparse
import asyncio
import os
import random
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Final

from bench.models import SIZES, write_model
from bench.record import spread, write
from diptych.engine.core.config import (
    BatchOptions,
    CacheOptions,
    EngineOptions,
    ModelOptions,
    Quantization,
)
from diptych.engine.core.params import SamplingParams
from diptych.server.client import EngineClient
from diptych.server.hosting import host_engine
from diptych.server.load.report import percentile

_VOCAB: Final = 256
_STREAM_PROMPT: Final = 128
_STREAM_TOKENS: Final = 8192  # more than any phase needs
_SETTLE_S: Final = 0.5


class Gaps:
    """Times of every token of the running decodes, per stream."""

    def __init__(self) -> None:
        self.times: list[list[float]] = []

    def between(self, begin: float, end: float) -> list[float]:
        """Gaps in ms that ended in [begin, end)."""
        return [
            (after - before) * 1e3
            for times in self.times
            for before, after in pairwise(times)
            if begin <= after < end
        ]

    def tokens(self, begin: float, end: float) -> int:
        return sum(begin <= at < end for times in self.times for at in times)


def prompt_of(rng: random.Random, num_tokens: int) -> list[int]:
    return [rng.randrange(3, _VOCAB) for _ in range(num_tokens)]


async def first_token_s(client: EngineClient, rng: random.Random, num_tokens: int) -> float:
    """Seconds to the only token of a new prompt."""
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    start = time.perf_counter()
    name = f"prompt-{rng.random()}"
    async for _ in client.stream(name, prompt_of(rng, num_tokens), params):
        pass
    return time.perf_counter() - start


@asynccontextmanager
async def decodes(client: EngineClient, rng: random.Random, count: int) -> AsyncIterator[Gaps]:
    """`count` sequences that decode all the while, past their prompts."""
    gaps = Gaps()
    params = SamplingParams(temperature=0.0, max_tokens=_STREAM_TOKENS, ignore_eos=True)

    async def run(name: str, prompt: list[int], times: list[float]) -> None:
        async for delta in client.stream(name, prompt, params):
            times += [time.perf_counter()] * len(delta.ids)

    tasks = []
    for _ in range(count):
        times: list[float] = []
        gaps.times.append(times)
        prompt = prompt_of(rng, _STREAM_PROMPT)
        tasks.append(asyncio.create_task(run(f"stream-{rng.random()}", prompt, times)))
    while any(len(times) < 2 for times in gaps.times):
        await asyncio.sleep(0.01)
    await asyncio.sleep(_SETTLE_S)
    try:
        yield gaps
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Measured:
    """Everything measured of one engine."""

    def __init__(self) -> None:
        self.alone_s: list[float] = []
        self.ttft_s: list[float] = []
        self.quiet_ms: list[float] = []
        self.loaded_ms: list[float] = []
        self.total_tokens_per_s: list[float] = []
        self.saturated_tokens_per_s: list[float] = []
        self.saturated_ms: list[float] = []

    async def round(
        self, client: EngineClient, rng: random.Random, args: argparse.Namespace
    ) -> None:
        self.alone_s.append(await first_token_s(client, rng, args.tokens))
        async with decodes(client, rng, args.others) as gaps:
            begin = time.perf_counter()
            await asyncio.sleep(args.quiet)
            self.quiet_ms += gaps.between(begin, time.perf_counter())
            begin = time.perf_counter()
            ttft = await first_token_s(client, rng, args.tokens)
            assert ttft < args.loaded, "the loaded phase is too short for this prompt"
            self.ttft_s.append(ttft)
            self.loaded_ms += gaps.between(begin, begin + ttft)
            await asyncio.sleep(args.loaded - ttft)
            num_tokens = args.tokens + gaps.tokens(begin, begin + args.loaded)
            self.total_tokens_per_s.append(num_tokens / args.loaded)
            if args.saturated:
                await self._saturate(client, rng, args, gaps)

    async def _saturate(
        self, client: EngineClient, rng: random.Random, args: argparse.Namespace, gaps: Gaps
    ) -> None:
        begin, num_prompts = time.perf_counter(), 0
        while time.perf_counter() < begin + args.saturated:
            await first_token_s(client, rng, args.tokens)
            num_prompts += 1
        end = time.perf_counter()
        num_tokens = num_prompts * args.tokens + gaps.tokens(begin, end)
        self.saturated_tokens_per_s.append(num_tokens / (end - begin))
        self.saturated_ms += gaps.between(begin, end)

    def report(self) -> dict[str, object]:
        p50 = percentile(self.loaded_ms, 50) / percentile(self.quiet_ms, 50)
        p99 = percentile(self.loaded_ms, 99) / percentile(self.quiet_ms, 99)
        result: dict[str, object] = {
            "ttft_alone_s": spread(self.alone_s),
            "ttft_loaded_s": spread(self.ttft_s),
            "itl_quiet_ms": percentiles(self.quiet_ms),
            "itl_loaded_ms": percentiles(self.loaded_ms),
            "itl_p50_ratio": p50,
            "itl_p99_ratio": p99,
            "ttft_ratio": spread(self.ttft_s)["median"] / spread(self.alone_s)["median"],
            "total_tokens_per_s": spread(self.total_tokens_per_s),
        }
        if self.saturated_ms:
            result["saturated_tokens_per_s"] = spread(self.saturated_tokens_per_s)
            result["saturated_itl_ms"] = percentiles(self.saturated_ms)
        return result


def percentiles(gaps_ms: list[float]) -> dict[str, float]:
    return {"p50": percentile(gaps_ms, 50), "p99": percentile(gaps_ms, 99), "count": len(gaps_ms)}


def engines(folder: Path, args: argparse.Namespace) -> dict[str, EngineOptions]:
    """Name -> options: one prefill and one decode worker, and mixed ones by tokens of a step."""
    common = EngineOptions(
        model=ModelOptions(path=str(folder), load_format="dummy", quantization=args.quantization),
        cache=CacheOptions(enable_prefix_caching=False),
        cpu_cores=args.cpu_cores,
    )
    found = {"1P1D": _replace(common, prefill=1, decode=1, mixed=0, tokens=args.prefill_step)}
    for tokens in args.mixed_steps:
        found[f"mixed {tokens}"] = _replace(common, prefill=0, decode=0, mixed=1, tokens=tokens)
    return found


def _replace(
    common: EngineOptions, *, prefill: int, decode: int, mixed: int, tokens: int
) -> EngineOptions:
    return EngineOptions(
        model=common.model,
        cache=common.cache,
        cpu_cores=common.cpu_cores,
        batch=BatchOptions(max_num_batched_tokens=tokens),
        prefill=prefill,
        decode=decode,
        mixed=mixed,
    )


async def bench(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    write_model(folder, args.size)
    rng = random.Random(args.seed)
    measured = {name: Measured() for name in engines(folder, args)}
    hosted = {}
    try:
        for name, options in engines(folder, args).items():
            hosted[name] = await host_engine(options, inline=False)
            await first_token_s(hosted[name].client, rng, args.tokens)  # touches its memory
        for _ in range(args.rounds):
            for name, engine in hosted.items():
                await measured[name].round(engine.client, rng, args)
    finally:
        for engine in hosted.values():
            await engine.close()
    reports = {name: found.report() for name, found in measured.items()}
    return {
        "model": args.size,
        "quantization": args.quantization,
        "tokens": args.tokens,
        "others": args.others,
        "rounds": args.rounds,
        "seed": args.seed,
        "load_average": os.getloadavg()[0],  # of the machine, this benchmark included
        **compared(measured),
        "engines": reports,
    }


def compared(measured: dict[str, Measured]) -> dict[str, object]:
    """1P1D against the best figure of any mixed engine."""
    split = measured["1P1D"]
    others = [found for name, found in measured.items() if name != "1P1D"]
    if not others:
        return {}
    result: dict[str, object] = {
        "total_throughput_of_best_mixed": spread(split.total_tokens_per_s)["median"]
        / max(spread(found.total_tokens_per_s)["median"] for found in others),
        "itl_p99_of_best_mixed": percentile(split.loaded_ms, 99)
        / min(percentile(found.loaded_ms, 99) for found in others),
    }
    if split.saturated_ms:
        result["saturated_throughput_of_best_mixed"] = spread(split.saturated_tokens_per_s)[
            "median"
        ] / max(spread(found.saturated_tokens_per_s)["median"] for found in others)
        result["saturated_itl_p99_of_best_mixed"] = percentile(split.saturated_ms, 99) / min(
            percentile(found.saturated_ms, 99) for found in others
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="bench-360m")
    parser.add_argument("--quantization", choices=Quantization.__args__)
    parser.add_argument("--tokens", type=int, default=2048, help="of the prompt that arrives")
    parser.add_argument("--others", type=int, default=4, help="sequences that decode")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quiet", type=float, default=4.0, help="seconds")
    parser.add_argument("--loaded", type=float, default=15.0, help="seconds")
    parser.add_argument("--saturated", type=float, default=0.0, help="seconds; 0: left out")
    parser.add_argument("--prefill-step", type=int, default=512, help="tokens, 1P1D")
    parser.add_argument("--mixed-steps", type=int, nargs="*", default=[256, 512, 1024])
    parser.add_argument("--cpu-cores")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write(args.out, asyncio.run(bench(Path(folder), args)))


if __name__ == "__main__":
    main()
