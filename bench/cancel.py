"""What a client that goes away costs the others: prefills that are cancelled, and blocks in use.

First part: `--prefills` long prompts are submitted and cancelled a moment later; a short request
comes at once after them. Its time to first token is compared with that on an idle engine, measured
in the same run, alternating; the bound is one chunk more (a chunk that runs is not broken off).

Second part: a request that holds most of the pool is left at a random moment, and one that needs
the whole pool is submitted at once. Its time in the queue is the time until every block was free;
it is set against the longest step of the same run.

Run: python -m bench.cancel [--size bench-360m] [--disconnects 1000] [--out FILE]
"""

import argparse
import asyncio
import random
import tempfile
import time
from pathlib import Path
from typing import Final

from bench.models import SIZES, write_model
from bench.record import spread, write
from diptych.engine.core.config import BatchOptions, CacheOptions, EngineOptions, ModelOptions
from diptych.engine.core.params import SamplingParams
from diptych.engine.core.types import blocks_for
from diptych.server.client import Delta, EngineClient
from diptych.server.hosting import host_engine
from diptych.server.load.report import percentile

_SHORT_LEN: Final = 64  # tokens: more than what is prefilled on the decode worker anyway
_POOL_BLOCKS: Final = 64
_BLOCK_SIZE: Final = 16
_CHUNK: Final = 64  # tokens, of the second part: a prompt takes many steps


def prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(3, 250) for _ in range(length)]


async def first(client: EngineClient, name: str, ids: list[int]) -> tuple[float, Delta]:
    """Seconds to the first token, and what came with it; the request is left then."""
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    start = time.perf_counter()
    stream = client.stream(name, ids, params)
    try:
        delta = await anext(stream)
        return time.perf_counter() - start, delta
    finally:
        await stream.aclose()


async def cancelled(client: EngineClient, name: str, ids: list[list[int]], wait_s: float) -> None:
    """Submits all, cancels all after `wait_s`."""
    tasks = [
        asyncio.create_task(first(client, f"{name}-{index}", row)) for index, row in enumerate(ids)
    ]
    await asyncio.sleep(wait_s)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def behind_prefills(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    rng = random.Random(args.seed)
    options = EngineOptions(
        model=ModelOptions(path=str(folder), load_format="dummy"),
        cache=CacheOptions(enable_prefix_caching=False),
    )
    chunk = options.batch.max_num_batched_tokens
    hosted = await host_engine(options, inline=False)
    idle, chunks, after = [], [], []
    for turn in range(-1, args.rounds):
        alone, _ = await first(hosted.client, f"idle{turn}", prompt(rng, _SHORT_LEN))
        whole, _ = await first(hosted.client, f"chunk{turn}", prompt(rng, chunk))
        long = [prompt(rng, args.prompt_len) for _ in range(args.prefills)]
        await cancelled(hosted.client, f"long{turn}", long, rng.uniform(0.2, 1.0) * whole)
        behind, _ = await first(hosted.client, f"short{turn}", prompt(rng, _SHORT_LEN))
        if turn >= 0:  # the first turn warms up
            idle.append(alone)
            chunks.append(whole)
            after.append(behind)
    await hosted.close()
    bound = percentile(idle, 50) + percentile(chunks, 50)
    return {
        "size": args.size,
        "prefills": args.prefills,
        "prompt_len": args.prompt_len,
        "chunk_tokens": chunk,
        "idle_ttft_s": spread(idle),
        "chunk_s": spread(chunks),
        "ttft_after_cancel_s": spread(after),
        "ratio_to_idle_plus_chunk": spread([value / bound for value in after]),
    }


async def leave(client: EngineClient, name: str, ids: list[int], rng: random.Random) -> None:
    """A request that is left after a random time or a random number of tokens."""
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    stream = client.stream(name, ids, params)

    async def read(most: float) -> None:
        count = 0
        async for _ in stream:
            count += 1
            if count >= most:
                return

    try:
        if rng.random() < 0.5:
            await read(rng.randrange(1, 60))
        else:
            await asyncio.wait_for(read(float("inf")), rng.expovariate(1 / 0.01))
    except TimeoutError:
        pass
    finally:
        await stream.aclose()


async def blocks_after_leaving(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    rng = random.Random(args.seed)
    options = EngineOptions(
        model=ModelOptions(path=str(folder), load_format="dummy"),
        cache=CacheOptions(num_blocks=_POOL_BLOCKS, block_size=_BLOCK_SIZE),
        batch=BatchOptions(max_num_batched_tokens=_CHUNK),
        separate_pools=args.transfer is not None,
        transfer=args.transfer or "auto",
    )
    hosted = await host_engine(options, inline=False)
    whole = _POOL_BLOCKS * _BLOCK_SIZE - 17  # its answer fits, and nothing else would
    assert blocks_for(whole + 16, _BLOCK_SIZE) == _POOL_BLOCKS
    waits, steps = [], []
    for index in range(args.disconnects):
        await leave(hosted.client, f"a{index}", prompt(rng, 700), rng)
        start = time.perf_counter()
        seconds, delta = await first(hosted.client, f"b{index}", prompt(rng, whole))
        waits.append(delta.queued_s or 0.0)
        steps.append(seconds / (-(-whole // _CHUNK)))
        assert time.perf_counter() - start < 30
    await hosted.close()
    return {
        "disconnects": args.disconnects,
        "transfer": args.transfer,
        "blocks_free_after_s": {
            "p50": percentile(waits, 50),
            "p99": percentile(waits, 99),
            "max": max(waits),
        },
        "step_s": {"p50": percentile(steps, 50), "p99": percentile(steps, 99), "max": max(steps)},
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="bench-360m", help="of the first part")
    parser.add_argument("--prefills", type=int, default=10)
    parser.add_argument("--prompt-len", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--disconnects", type=int, default=1000)
    parser.add_argument("--transfer", choices=["auto", "shm", "tcp", "nixl"], help="separate pools")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory() as folder:
        prefills = asyncio.run(behind_prefills(write_model(Path(folder) / "a", args.size), args))
        blocks = asyncio.run(blocks_after_leaving(write_model(Path(folder) / "b", "tiny"), args))
    write(args.out, {"seed": args.seed, "behind_prefills": prefills, "blocks": blocks})


if __name__ == "__main__":
    main()
