"""The handoff of one long sequence from the prefill process to the decode process.

Measured from the end of the prefill's last kernel to the start of the decode worker's first step
with the sequence, both read from the control page. That nothing is copied is measured too: the
pool's resident bytes grow by the sequence's blocks once, not twice. Under load the decode worker is
busy with other sequences, and what counts is the gap that a client sees from token 0 to token 1.
"""

import argparse
import asyncio
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Final

from bench.models import write_model
from bench.record import spread, write
from diptych.engine.core.config import CacheOptions, EngineOptions, ModelOptions
from diptych.engine.core.model_config import load_model_config
from diptych.engine.core.params import SamplingParams
from diptych.engine.core.types import blocks_for
from diptych.server.client import EngineClient
from diptych.server.hosting import Hosted, host_engine
from diptych.server.load.report import percentile
from diptych.transfer.control_page import ControlPage, page_bytes
from diptych.transfer.shared_memory import SharedMemory

_PREFILL: Final = 0  # worker numbers of 1P1D
_DECODE: Final = 1
_BLOCK_SIZE: Final = 16
_VOCAB: Final = 256
_LOAD_TOKENS: Final = 100_000


def memory_fd(supervisor: int, name: str) -> int:
    """One of the supervisor's memories, opened again from outside."""
    folder = Path(f"/proc/{supervisor}/fd")
    for entry in folder.iterdir():
        if f"memfd:diptych-{name}" in os.readlink(entry):
            return os.open(entry, os.O_RDWR)
    raise FileNotFoundError(f"the supervisor holds no memory {name!r}")


def resident_bytes(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


def prompt_of(rng: random.Random, num_tokens: int) -> list[int]:
    return [rng.randrange(3, _VOCAB) for _ in range(num_tokens)]


async def gap_ms(client: EngineClient, name: str, prompt: list[int]) -> float:
    """Two tokens, the first from the prefill worker, the second from the decode worker."""
    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    at: list[float] = []
    async for delta in client.stream(name, prompt, params):
        at += [time.perf_counter()] * len(delta.ids)
    assert len(at) == 2
    return (at[1] - at[0]) * 1e3


async def idle_rounds(
    hosted: Hosted, page: ControlPage, seeds: range, num_tokens: int
) -> tuple[list[float], list[float]]:
    """Per round: the handoff and the client's gap, in ms; nothing else runs. A round that the
    scheduler had computed where it decodes has no handoff and is left out."""
    handoffs, gaps = [], []
    for seed in seeds:  # another prompt each: no prefix may be known
        before = page.pulse(_DECODE)
        prompt = prompt_of(random.Random(seed), num_tokens)
        gap = await gap_ms(hosted.client, f"idle-{seed}", prompt)
        prefill, decode = page.pulse(_PREFILL), page.pulse(_DECODE)
        if decode.steps != before.steps + 1:
            continue
        gaps.append(gap)
        handoffs.append((decode.step_start_ns - prefill.step_end_ns) / 1e6)
    return handoffs, gaps


async def endless(client: EngineClient, name: str, gaps: list[float]) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=_LOAD_TOKENS, ignore_eos=True)
    last = 0.0
    async for _ in client.stream(name, prompt_of(random.Random(name), 64), params):
        now = time.perf_counter()
        if last:
            gaps.append((now - last) * 1e3)
        last = now


async def loaded_rounds(
    hosted: Hosted, rounds: int, num_tokens: int, others: int
) -> tuple[list[float], list[float]]:
    """Per round the gap from token 0 to token 1 in ms; and the gaps of the others' tokens."""
    other_gaps: list[float] = []
    tasks = [
        asyncio.create_task(endless(hosted.client, f"other-{i}", other_gaps)) for i in range(others)
    ]
    while len(other_gaps) < 8 * others:
        await asyncio.sleep(0.01)
    gaps = []
    for round_ in range(rounds):
        prompt = prompt_of(random.Random(1_000_000 + round_), num_tokens)
        gaps.append(await gap_ms(hosted.client, f"loaded-{round_}", prompt))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return gaps, other_gaps


def percentiles(values: list[float]) -> dict[str, float]:
    return {**spread(values), "p90": percentile(values, 90), "p99": percentile(values, 99)}


async def bench(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    context = max(args.tokens + 64, _LOAD_TOKENS + 128)
    write_model(folder, args.size, max_position_embeddings=context, vocab_size=max(_VOCAB, 384))
    num_blocks = 8 * blocks_for(args.tokens, _BLOCK_SIZE)
    options = EngineOptions(
        model=ModelOptions(path=str(folder), load_format="dummy"),
        cache=CacheOptions(num_blocks=num_blocks, block_size=_BLOCK_SIZE),
    )
    hosted = await host_engine(options, inline=False)
    try:
        assert hosted.launched is not None
        supervisor = hosted.launched.supervisor_pid
        num_pulses = len(options.workers())
        page_fd, pool_fd = memory_fd(supervisor, "page"), memory_fd(supervisor, "pool")
        memory = SharedMemory(page_fd, page_bytes(num_blocks, num_pulses))
        page = ControlPage(memory.view, num_blocks, num_pulses)
        resident = resident_bytes(pool_fd)
        first, _ = await idle_rounds(hosted, page, range(1), args.tokens)
        grown = resident_bytes(pool_fd) - resident
        config = load_model_config(folder)
        held = blocks_for(args.tokens + 1, _BLOCK_SIZE) * config.block_bytes(_BLOCK_SIZE)
        handoffs, gaps = await idle_rounds(hosted, page, range(1, args.rounds + 1), args.tokens)
        loaded, others = await loaded_rounds(hosted, args.rounds, args.tokens, args.others)
        return {
            "tokens": args.tokens,
            "model": args.size,
            "kv_bytes_of_sequence": held,
            "pool_bytes_touched": grown,
            # A copy would take its bytes again; less than that is rounding to (huge) pages.
            "kv_bytes_copied": grown - held if grown >= 2 * held else 0,
            "load_average": os.getloadavg()[0],  # of the machine, this benchmark included
            "idle_handoff_ms": percentiles(handoffs),
            "idle_client_gap_ms": percentiles(gaps),
            "first_handoff_ms": first[0],
            "loaded_client_gap_ms": percentiles(loaded),
            "loaded_others": args.others,
            "loaded_others_gap_ms": percentiles(others),
        }
    finally:
        await hosted.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--others", type=int, default=8, help="sequences decoding under load")
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write(args.out, asyncio.run(bench(Path(folder), args)))


if __name__ == "__main__":
    main()
