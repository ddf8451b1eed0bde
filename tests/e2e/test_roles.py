"""Workers that move between prefill and decode under load: same tokens, nothing lost."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from bench.procs import engine_processes
from diptych.engine.core.config import EngineOptions, SchedulerOptions
from diptych.engine.core.messages import Stats
from diptych.engine.core.params import SamplingParams
from diptych.server.client import EngineClient
from diptych.server.hosting import Hosted, host_engine
from tests.support.processes import tiny_options

SHORT = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)


async def answer(
    client: EngineClient, name: str, prompt: list[int], params: SamplingParams
) -> list[int]:
    ids: list[int] = []
    async for delta in client.stream(name, prompt, params):
        ids += delta.ids
    return ids


async def ask(
    client: EngineClient, tag: str, length: int, params: SamplingParams, salt: int = 0
) -> list[int]:
    """Eight requests at once; the tokens of all."""
    prompts = [[salt] + [(i * 31 + j * 7) % 250 for j in range(length)] for i in range(8)]
    tasks = [answer(client, f"{tag}{i}", prompt, params) for i, prompt in enumerate(prompts)]
    return [token for ids in await asyncio.gather(*tasks) for token in ids]


async def watch(hosted: Hosted, seen: list[list[int]]) -> None:
    """Notes every set of dials that the scheduler reports."""
    while True:
        stats = hosted.client.stats()
        dials = [] if stats is None else [worker.dial for worker in stats.workers]
        if dials and (not seen or seen[-1] != dials):
            seen.append(dials)
        await asyncio.sleep(0.02)


async def at_rest(hosted: Hosted) -> Stats:
    """The sums of after the last request."""
    fresh, before = 0, hosted.client.stats()
    for _ in range(1000):
        stats = hosted.client.stats()
        if stats is not before:
            fresh, before = fresh + 1, stats
        if fresh >= 2 and stats is not None and not stats.running and not stats.blocks_used:
            return stats
        await asyncio.sleep(0.01)
    raise AssertionError(f"blocks are still used: {hosted.client.stats()}")


async def run(options: EngineOptions) -> tuple[list[list[int]], list[list[int]], Stats]:
    """(tokens of each wave, the dials over time, the last sums)."""
    hosted = await host_engine(options, inline=False)
    seen: list[list[int]] = []
    watcher = asyncio.create_task(watch(hosted, seen))
    try:
        waves = []
        for turn in range(2):
            waves.append(await ask(hosted.client, f"p{turn}-", 3000 + turn, SHORT))
            waves.append(await ask(hosted.client, f"d{turn}-", 20 + turn, LONG))
        return waves, seen, await at_rest(hosted)
    finally:
        watcher.cancel()
        await hosted.close()


@pytest.mark.timeout(120)
def test_workers_follow_the_load(tmp_path: Path) -> None:
    """Over one pool and over two."""
    fixed = tiny_options(tmp_path, num_blocks=4096, decode=2)
    right, seen, fixed_stats = asyncio.run(run(fixed))
    assert seen == [[100, 0, 0]]
    assert fixed_stats.dial_moves == 0
    targets = SchedulerOptions(ttft_slo_s=0.001, itl_slo_s=60.0, steer_s=0.02)
    for separate in (False, True):
        moving = msgspec.structs.replace(
            fixed,
            scheduler=targets,
            batch=msgspec.structs.replace(fixed.batch, itl_slo_s=targets.pace_s),
            separate_pools=separate,
        )
        waves, seen, stats = asyncio.run(run(moving))
        assert waves == right
        assert stats.dial_moves > 0, f"nobody moved (separate pools: {separate})"
        assert all(max(dials) > 0 and min(dials) < 100 for dials in seen)
        assert stats.losses == 0


async def until(hosted: Hosted, what: str, holds: Callable[[Stats], bool]) -> Stats:
    for _ in range(2000):
        stats = hosted.client.stats()
        if stats is not None and holds(stats):
            return stats
        await asyncio.sleep(0.01)
    raise AssertionError(f"never {what}: {hosted.client.stats()}")


async def to_zero_and_back(options: EngineOptions) -> None:
    hosted = await host_engine(options, inline=False)
    assert hosted.launched is not None
    supervisor = hosted.launched.supervisor_pid
    try:
        first = await ask(hosted.client, "a", 60, LONG)
        for turn in range(2):
            await until(hosted, "at zero", lambda stats: not stats.workers)
            for _ in range(2000):
                if not {"worker0", "warm"} & engine_processes(supervisor).keys():
                    break
                await asyncio.sleep(0.01)
            assert engine_processes(supervisor).keys() == {"scheduler0"}, "the weights went too"
            assert hosted.client.health().ok
            assert await ask(hosted.client, f"b{turn}-", 60, LONG) == first
            stats = await until(hosted, "back", lambda stats: stats.cold_start is not None)
            start = stats.cold_start
            assert start is not None
            assert start.weights_s > 0.0
            stages = (start.asked_s, start.import_s, start.weights_s, start.fork_s, start.ready_s)
            assert abs(sum(stages) + start.join_s - start.total_s) < 0.1 + 0.1 * start.total_s
        assert stats.losses == 0
        assert stats.prefix_hits > 0, "the pool outlives its workers"
    finally:
        await hosted.close()


@pytest.mark.timeout(120)
def test_scale_to_zero_and_back(tmp_path: Path) -> None:
    scheduler = SchedulerOptions(autoscale=(0, 1), idle_s=0.3, steer_s=0.1)
    options = tiny_options(tmp_path, prefill=0, decode=0)
    asyncio.run(to_zero_and_back(msgspec.structs.replace(options, mixed=1, scheduler=scheduler)))


async def keep_busy(hosted: Hosted, over: asyncio.Event) -> None:
    """Prompts until `over`, however fast they are answered."""
    turn = 0
    while not over.is_set():
        asks = [ask(hosted.client, f"busy{turn}-{i}-", 1500, LONG, salt=8 + i) for i in range(8)]
        await asyncio.gather(*asks)
        turn += 1


async def grow_and_shrink(options: EngineOptions) -> None:
    hosted = await host_engine(options, inline=False)
    try:
        waves = [ask(hosted.client, f"a{i}-", 1500, LONG, salt=i) for i in range(8)]
        over = asyncio.Event()
        first = asyncio.gather(*waves, keep_busy(hosted, over))
        await until(hosted, "three workers", lambda stats: len(stats.workers) == 3)
        over.set()
        right = (await first)[:-1]
        await until(hosted, "one worker", lambda stats: len(stats.workers) == 1)
        for i in (0, 7):
            again = await ask(hosted.client, f"b{i}-", 1500, LONG, salt=i)
            assert again == right[i], "the last one does both"
        assert (await at_rest(hosted)).losses == 0
    finally:
        await hosted.close()


@pytest.mark.timeout(120)
def test_more_and_fewer_workers(tmp_path: Path) -> None:
    """Those that leave while they run something give it to others, who go on with it."""
    scheduler = SchedulerOptions(
        autoscale=(1, 3), idle_s=0.3, steer_s=0.05, leave_s=0.1, ttft_slo_s=0.001
    )
    options = tiny_options(tmp_path, num_blocks=4096)
    asyncio.run(grow_and_shrink(msgspec.structs.replace(options, scheduler=scheduler)))
