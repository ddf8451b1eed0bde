"""Aborts requests at random moments; afterwards the pool must be as it was.

A client that leaves closes its stream: before the first token, in the middle of a long prompt,
while it decodes, or just as it ends. `python -m bench.aborts --aborts 10000`.
"""

import argparse
import asyncio
import random
import tempfile
import time
from pathlib import Path
from typing import get_args

from bench.chaos import blocks_at_rest
from bench.losslessness import prompt_of
from bench.models import write_model
from bench.record import spread, write
from diptych.engine.core.config import CacheOptions, EngineOptions, ModelOptions, Transfer
from diptych.engine.core.params import SamplingParams
from diptych.server.client import EngineClient
from diptych.server.hosting import host_engine


async def leave(client: EngineClient, name: str, rng: random.Random) -> None:
    """One request, left after a random number of tokens or a random time."""
    params = SamplingParams(
        n=rng.choice([1, 1, 3]), max_tokens=rng.randrange(1, 120), seed=1, temperature=0.7
    )
    prompt = prompt_of(rng.choice(["a", "b", name]), rng.choice([1, 20, 300, 1500]))

    async def read(most: int) -> None:
        stream = client.stream(name, prompt, params)
        try:
            async for _ in stream:
                most -= 1
                if most <= 0:
                    return
        finally:
            await stream.aclose()

    if rng.random() < 0.5:
        await read(rng.randrange(1, 60))
        return
    try:
        await asyncio.wait_for(read(1 << 30), rng.expovariate(1 / 0.03))
    except TimeoutError:
        pass


async def run(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    options = EngineOptions(
        model=ModelOptions(path=str(folder), load_format="dummy"),
        cache=CacheOptions(num_blocks=args.num_blocks),
        separate_pools=args.transfer is not None,
        transfer=args.transfer or "auto",
        threads=1,
    )
    hosted = await host_engine(options, inline=args.inline)
    rng = random.Random(args.seed)
    gate = asyncio.Semaphore(args.users)
    start = time.monotonic()

    async def one(index: int, seed: int) -> None:
        async with gate:
            await leave(hosted.client, f"a{index}", random.Random(seed))

    await asyncio.gather(*(one(i, rng.getrandbits(60)) for i in range(args.aborts)))
    seconds = time.monotonic() - start
    freed = time.monotonic()
    blocks = await blocks_at_rest(hosted)
    stats = hosted.client.stats()
    await hosted.close()
    assert stats is not None
    return {
        "seed": args.seed,
        "aborts": args.aborts,
        "seconds": seconds,
        "aborts_per_s": args.aborts / seconds,
        "blocks_leaked": blocks,
        "running": stats.running,
        "waiting": stats.waiting,
        "rest_after_s": spread([time.monotonic() - freed]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--aborts", type=int, default=10_000)
    parser.add_argument("--users", type=int, default=32)
    parser.add_argument("--num-blocks", type=int, default=1024)
    parser.add_argument("--inline", action="store_true")
    parser.add_argument("--transfer", choices=get_args(Transfer), help="separate pools")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = asyncio.run(run(write_model(Path(folder), "tiny"), args))
    write(args.out, result)
    return 0 if result["blocks_leaked"] == 0 and not result["running"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
