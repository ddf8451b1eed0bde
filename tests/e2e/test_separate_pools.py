"""Prefill and decode with memories of their own, as real processes: same tokens, nothing leaked."""

import asyncio
import os
import signal
from pathlib import Path

import msgspec
import pytest

from bench.procs import descendants, engine_processes
from diptych.engine.core.config import Transfer
from diptych.engine.core.errors import ConfigError
from diptych.engine.core.messages import Stats
from diptych.engine.core.params import SamplingParams
from diptych.server.client import EngineClient
from diptych.server.hosting import Hosted, host_engine
from diptych.transfer.nixl_wire import nixl_installed
from tests.support.processes import tiny_options

PARAMS = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
PROMPTS = [
    [(i * 7 + j) % 250 for j in range(length)] for i, length in enumerate((40, 333, 64, 201))
]

LONG = [[(i * 11 + j * 3) % 250 for j in range(900)] for i in range(6)]


async def answer(client: EngineClient, name: str, prompt: list[int]) -> list[int]:
    ids: list[int] = []
    async for delta in client.stream(name, prompt, PARAMS):
        ids += delta.ids
    return ids


async def settled(hosted: Hosted) -> Stats:
    """The sums once nothing runs; the first report from now may have been on its way."""
    fresh, before = 0, hosted.client.stats()
    for _ in range(1000):
        stats = hosted.client.stats()
        if stats is not before:
            fresh, before = fresh + 1, stats
        if fresh >= 2 and stats is not None and not stats.running and not stats.blocks_used:
            return stats
        await asyncio.sleep(0.01)
    raise AssertionError(f"blocks are still used: {hosted.client.stats()}")


async def ask_all(
    client: EngineClient, tag: str, prompts: list[list[int]] = PROMPTS
) -> list[list[int]]:
    tasks = [answer(client, f"{tag}{i}", prompt) for i, prompt in enumerate(prompts)]
    return await asyncio.gather(*tasks)


async def expected(tmp_path: Path, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    options = msgspec.structs.replace(tiny_options(tmp_path, prefill=0, decode=0), mixed=1)
    hosted = await host_engine(options, inline=True)
    try:
        return await ask_all(hosted.client, "inline", prompts)
    finally:
        await hosted.close()


async def kill_nixl(hosted: Hosted, right: list[list[int]], long: list[list[int]]) -> None:
    """SIGKILL of each NIXL process while blocks move: no attempt needs to fail for the client."""
    assert hosted.launched is not None
    supervisor = hosted.launched.supervisor_pid
    for name, part in (("worker0", slice(0, 3)), ("worker1", slice(3, 6))):
        (child,) = descendants(engine_processes(supervisor)[name])
        asked = asyncio.ensure_future(ask_all(hosted.client, f"{name}-nixl", LONG[part]))
        await asyncio.sleep(0)
        os.kill(child, signal.SIGKILL)
        assert await asked == long[part]
        assert await ask_all(hosted.client, f"nixl of {name} killed") == right
        (again,) = descendants(engine_processes(supervisor)[name])
        assert again != child


async def run(tmp_path: Path, transfer: Transfer) -> None:
    right = await expected(tmp_path)
    options = msgspec.structs.replace(
        tiny_options(tmp_path, hang_s=1.0), separate_pools=True, transfer=transfer
    )
    hosted = await host_engine(options, inline=False)
    try:
        assert await ask_all(hosted.client, "first") == right
        first = await settled(hosted)
        assert first.blocks_pulled >= sum(len(prompt) // 16 for prompt in PROMPTS[1:])
        assert first.losses == 0
        assert await ask_all(hosted.client, "again") == right
        assert (await settled(hosted)).prefix_hits > 0
        assert hosted.launched is not None
        if transfer == "nixl":
            await kill_nixl(hosted, right, await expected(tmp_path, LONG))
        for name, kind in (("worker0", signal.SIGKILL), ("worker1", signal.SIGSTOP)):
            pid = engine_processes(hosted.launched.supervisor_pid)[name]
            fresh = [[i, *prompt] for i, prompt in enumerate(PROMPTS)]
            tasks = asyncio.gather(
                *(answer(hosted.client, f"{name}-{i}", p) for i, p in enumerate(fresh))
            )
            await asyncio.sleep(0)
            os.kill(pid, kind)
            await tasks
            assert await ask_all(hosted.client, f"after {name}") == right
        await settled(hosted)
    finally:
        await hosted.close()


@pytest.mark.parametrize("transfer", ["shm", "tcp", "nixl"])
@pytest.mark.timeout(120)
def test_same_tokens_through_kills_and_hangs(tmp_path: Path, transfer: Transfer) -> None:
    if transfer == "nixl" and not nixl_installed():
        pytest.skip("NIXL is not installed")
    asyncio.run(run(tmp_path, transfer))


def test_a_way_to_move_blocks_needs_blocks_to_move(tmp_path: Path) -> None:
    options = msgspec.structs.replace(tiny_options(tmp_path), transfer="tcp")
    with pytest.raises(ConfigError, match="--separate-pools"):
        options.verify()
    options = msgspec.structs.replace(tiny_options(tmp_path), separate_pools=True)
    with pytest.raises(ConfigError, match="inline"):
        asyncio.run(host_engine(options, inline=True))
