"""Prefill and decode with memories of their own, as real processes: same tokens, nothing leaked."""

import asyncio
import os
import signal
from pathlib import Path

import msgspec
import pytest

from bench.procs import descendants, engine_processes
from diptych.engine.core.config import EngineOptions, KVCacheDtype, PoolOptions, Transfer
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


def separate(tmp_path: Path, transfer: Transfer, prefill: int, decode: int) -> EngineOptions:
    """1P1D with blocks of these many tokens."""
    options = tiny_options(tmp_path, hang_s=1.0)
    size = max(prefill, decode)
    return msgspec.structs.replace(
        options,
        separate_pools=True,
        transfer=transfer,
        cache=msgspec.structs.replace(options.cache, block_size=size),
        prefill_pool=PoolOptions(block_size=prefill),
        decode_pool=PoolOptions(block_size=decode),
    )


async def run(tmp_path: Path, transfer: Transfer, prefill: int, decode: int) -> None:
    right = await expected(tmp_path)
    options = separate(tmp_path, transfer, prefill, decode)
    hosted = await host_engine(options, inline=False)
    try:
        assert await ask_all(hosted.client, "first") == right
        first = await settled(hosted)
        size = max(prefill, decode)
        assert first.blocks_pulled >= sum(len(prompt) // size for prompt in PROMPTS[1:])
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


@pytest.mark.parametrize(
    ("transfer", "prefill", "decode"),
    [
        ("shm", 16, 16),
        ("tcp", 16, 16),
        ("nixl", 16, 16),
        ("shm", 64, 16),
        ("tcp", 32, 64),
        ("nixl", 16, 32),
    ],
)
@pytest.mark.timeout(120)
def test_same_tokens_through_kills_and_hangs(
    tmp_path: Path, transfer: Transfer, prefill: int, decode: int
) -> None:
    if transfer == "nixl" and not nixl_installed():
        pytest.skip("NIXL is not installed")
    asyncio.run(run(tmp_path, transfer, prefill, decode))


def test_a_way_to_move_blocks_needs_blocks_to_move(tmp_path: Path) -> None:
    options = msgspec.structs.replace(tiny_options(tmp_path), transfer="tcp")
    with pytest.raises(ConfigError, match="--separate-pools"):
        options.verify()
    options = msgspec.structs.replace(tiny_options(tmp_path), separate_pools=True)
    with pytest.raises(ConfigError, match="inline"):
        asyncio.run(host_engine(options, inline=True))


async def logprobs_of(hosted: Hosted, prompt: list[int]) -> list[tuple[int, float]]:
    params = msgspec.structs.replace(PARAMS, logprobs=1, max_tokens=12)
    rows: list[tuple[int, float]] = []
    async for delta in hosted.client.stream("logprobs", prompt, params):
        assert delta.logprobs is not None
        rows += zip(delta.ids, (entry.logprob for entry in delta.logprobs), strict=True)
    return rows


async def other_dtypes(tmp_path: Path, prefill: KVCacheDtype, decode: KVCacheDtype) -> None:
    """Within the error of bfloat16's 8 bits; and under another fingerprint."""
    inline = msgspec.structs.replace(tiny_options(tmp_path, prefill=0, decode=0), mixed=1)
    hosted = await host_engine(inline, inline=True)
    right = await logprobs_of(hosted, PROMPTS[1])
    fingerprint = hosted.client.info.fingerprint
    await hosted.close()
    options = msgspec.structs.replace(
        separate(tmp_path, "shm", 16, 32),
        prefill_pool=PoolOptions(block_size=16, kv_cache_dtype=prefill),
        decode_pool=PoolOptions(block_size=32, kv_cache_dtype=decode),
    )
    hosted = await host_engine(options, inline=False)
    try:
        found = await logprobs_of(hosted, PROMPTS[1])
        assert (await settled(hosted)).blocks_pulled
        assert hosted.client.info.fingerprint != fingerprint
    finally:
        await hosted.close()
    assert [token for token, _ in found] == [token for token, _ in right]
    errors = [abs(a - b) for (_, a), (_, b) in zip(found, right, strict=True)]
    assert max(errors) < 0.02, errors
    assert any(errors), "nothing was rounded: the dtypes did not matter"
    if prefill == "float32":
        assert errors[0] == 0.0, "the first token comes from the pool that was not rounded"


@pytest.mark.parametrize(("prefill", "decode"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_pools_of_other_dtypes(tmp_path: Path, prefill: KVCacheDtype, decode: KVCacheDtype) -> None:
    asyncio.run(other_dtypes(tmp_path, prefill, decode))


def test_int8_pools_meet_int8_ones_only(tmp_path: Path) -> None:
    common = msgspec.structs.replace
    options = separate(tmp_path, "shm", 16, 32)
    narrow = common(options, cache=common(options.cache, kv_cache_dtype="int8"))
    narrow.verify()
    for pool in ("prefill_pool", "decode_pool"):
        one = common(getattr(options, pool), kv_cache_dtype="int8")
        with pytest.raises(ConfigError, match="not with auto"):
            common(options, **{pool: one}).verify()
        other = common(getattr(options, pool), kv_cache_dtype="bfloat16")
        with pytest.raises(ConfigError, match="not with bfloat16"):
            common(narrow, **{pool: other}).verify()
    sides = {p: PoolOptions(kv_cache_dtype="int8") for p in ("prefill_pool", "decode_pool")}
    common(options, **sides).verify()
    with pytest.raises(ConfigError, match="int8"):
        common(options, mixed=1, **sides).verify()


def test_pools_that_cannot_be_converted_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="multiple of the smaller"):
        separate(tmp_path, "shm", 48, 32).verify()
    with pytest.raises(ConfigError, match="multiple of 16"):
        separate(tmp_path, "shm", 8, 32).verify()
    special = PoolOptions(kv_cache_dtype="bfloat16")
    options = msgspec.structs.replace(tiny_options(tmp_path), decode_pool=special)
    with pytest.raises(ConfigError, match="--separate-pools"):
        options.verify()
