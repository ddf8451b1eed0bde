"""Workers of several ranks as real processes: the inline engine's bits, and they die as one."""

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench.procs import descendants, engine_processes
from diptych import Engine
from diptych.engine.core.config import EngineOptions, Quantization, RankLink
from diptych.engine.core.errors import ConfigError
from diptych.engine.core.messages import Stats
from diptych.engine.core.params import SamplingParams
from diptych.engine.core.plan import TokenLogprobs
from diptych.server.client import EngineClient
from diptych.server.hosting import Hosted, host_engine
from diptych.server.launch import start_engine
from diptych.server.process_table import read_processes
from diptych.transfer.nixl_wire import nixl_installed
from tests.support.processes import tiny_options, wait_for

DETECT_S_MAX = 0.5
PARAMS = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, logprobs=2)
PROMPTS = [[(i * 7 + j) % 250 for j in range(length)] for i, length in enumerate((40, 333, 1, 201))]
SCORED = msgspec.structs.replace(PARAMS, prompt_logprobs=1)
Answer = tuple[list[int], list[TokenLogprobs], list[TokenLogprobs]]  # ids, of them, of the prompt


def options_of(
    folder: Path,
    sizes: tuple[int, int],
    quantization: Quantization | None = None,
    **changes: object,
) -> EngineOptions:
    options = tiny_options(folder, hang_s=1.0)
    model = msgspec.structs.replace(options.model, quantization=quantization)
    return msgspec.structs.replace(
        options, model=model, prefill_tp=sizes[0], decode_tp=sizes[1], **changes
    )


async def answer(
    client: EngineClient, name: str, prompt: list[int], params: SamplingParams = PARAMS
) -> Answer:
    ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    of_prompt: list[TokenLogprobs] = []
    async for delta in client.stream(name, prompt, params):
        ids += delta.ids
        logprobs += delta.logprobs or []
        of_prompt += delta.prompt_logprobs or []
    return ids, logprobs, of_prompt


async def ask_all(client: EngineClient, tag: str) -> list[Answer]:
    tasks = [answer(client, f"{tag}{i}", prompt) for i, prompt in enumerate(PROMPTS)]
    return await asyncio.gather(*tasks, answer(client, f"{tag} scored", PROMPTS[3], SCORED))


async def inline_answers(
    folder: Path, num_shards: int, quantization: Quantization | None = None
) -> list[Answer]:
    options = options_of(
        folder,
        (num_shards, num_shards),
        quantization,
        prefill=0,
        decode=0,
        mixed=1,
        tensor_parallel_size=num_shards,
    )
    hosted = await host_engine(options, inline=True)
    try:
        return await ask_all(hosted.client, "inline")
    finally:
        await hosted.close()


def rank_pid(hosted: Hosted, worker: int, rank: int) -> int:
    assert hosted.launched is not None
    return engine_processes(hosted.launched.supervisor_pid)[f"worker{worker}.{rank}"]


async def settled(hosted: Hosted) -> Stats:
    """The sums once nothing uses a block; the first report from now may have been on its way."""
    fresh, before = 0, hosted.client.stats()
    for _ in range(1000):
        stats = hosted.client.stats()
        if stats is not before:
            fresh, before = fresh + 1, stats
        if fresh >= 2 and stats is not None and not stats.running and not stats.blocks_used:
            return stats
        await asyncio.sleep(0.01)
    raise AssertionError(f"blocks are still used: {hosted.client.stats()}")


async def disturb(hosted: Hosted, tag: str, pid: int, how: signal.Signals) -> None:
    """Signals a process while every prompt, made new, is under way; nothing may fail."""
    fresh = [[len(tag), *prompt] for prompt in PROMPTS]
    tasks = [
        asyncio.create_task(answer(hosted.client, f"{tag}{i}", p)) for i, p in enumerate(fresh)
    ]
    await asyncio.sleep(0)
    os.kill(pid, how)
    for ids, _, _ in await asyncio.gather(*tasks):
        assert len(ids) == PARAMS.max_tokens


@pytest.mark.parametrize(
    ("sizes", "changes"),
    [
        ((2, 2), {}),
        ((2, 1), {}),
        ((1, 2), {"separate_pools": True, "transfer": "shm"}),
        ((2, 4), {}),  # more ranks than KV heads
        ((2, 1), {"rank_link": "gloo"}),
        ((2, 1), {"separate_pools": True, "transfer": "nixl"}),
        ((1, 2), {"separate_pools": True, "transfer": "nixl"}),
        ((2, 1), {"quantization": "int8"}),
        ((1, 2), {"quantization": "int4", "separate_pools": True, "transfer": "shm"}),
    ],
)
def test_any_sizes_give_the_inline_bits(
    tmp_path: Path, sizes: tuple[int, int], changes: dict[str, Any]
) -> None:
    if changes.get("transfer") == "nixl" and not nixl_installed():
        pytest.skip("NIXL is not installed")

    async def scenario() -> None:
        right = await inline_answers(tmp_path, max(sizes), changes.get("quantization"))
        hosted = await host_engine(options_of(tmp_path, sizes, **changes), inline=False)
        try:
            assert await ask_all(hosted.client, "first") == right
            assert await ask_all(hosted.client, "cached") == right
            stats = await settled(hosted)
            assert stats.losses == 0, "recovery hid a worker that failed"
            assert bool(stats.blocks_pulled) == ("separate_pools" in changes)
            assert all(worker.steps for worker in stats.workers)
        finally:
            await hosted.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("link", ["shm", "gloo"])
def test_a_rank_that_dies_or_hangs_is_its_worker_s_end_and_nobody_s_else(
    tmp_path: Path, link: RankLink
) -> None:
    async def scenario() -> None:
        right = await inline_answers(tmp_path, 2)
        hosted = await host_engine(options_of(tmp_path, (2, 2), rank_link=link), inline=False)
        try:
            assert await ask_all(hosted.client, "calm") == right
            for worker in (0, 1):
                await disturb(hosted, f"kill{worker}", rank_pid(hosted, worker, 1), signal.SIGKILL)
                assert await ask_all(hosted.client, f"after{worker}") == right
            await disturb(hosted, "stop", rank_pid(hosted, 1, 1), signal.SIGSTOP)
            assert await ask_all(hosted.client, "after stop") == right
            await settled(hosted)
        finally:
            await hosted.close()

    asyncio.run(scenario())


def test_an_idle_worker_ends_with_its_rank_and_the_rank_with_its_worker(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with start_engine(options_of(tmp_path, (2, 1))) as launched:
        supervisor, run_dir = launched.supervisor_pid, launched.api.path
        victims = [
            ("worker0.1", signal.SIGKILL, "signal 9"),
            ("worker0", signal.SIGKILL, "signal 9"),
            ("worker0.1", signal.SIGSEGV, "exit status 70"),  # a fault of one is the worker's
        ]
        for victim, how, seen_as in victims:
            before = {
                name: pid
                for name, pid in engine_processes(supervisor).items()
                if name.startswith("worker0")
            }
            assert len(before) == 2
            epoch = read_processes(run_dir)["worker0"].epoch
            start_ns = time.monotonic_ns()
            os.kill(before[victim], how)
            wait_for("seen", lambda e=epoch: read_processes(run_dir)["worker0"].epoch > e)
            seen_s = (read_processes(run_dir)["worker0"].changed_ns - start_ns) / 1e9
            print(f"{victim}: end seen after {seen_s * 1e3:.1f} ms")
            # A fault may first leave a core file, which takes the system as long as it takes.
            assert seen_s <= DETECT_S_MAX or how is signal.SIGSEGV
            assert not set(before.values()) & set(descendants(supervisor))
            wait_for("up", lambda: read_processes(run_dir)["worker0"].state == "up")
            assert f"worker0.{epoch} ended: {seen_as}" in capfd.readouterr().err


def test_what_cannot_be_cut_is_refused_at_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tensor-parallel size 3"):
        start_engine(options_of(tmp_path, (3, 1)))
    with pytest.raises(ConfigError, match="between 1 and 64"):
        start_engine(options_of(tmp_path, (0, 1)))


def test_the_python_engine_takes_sizes() -> None:
    prompts = ["What is 12 + 30?", "Reverse the word 'planet'."]
    greedy = SamplingParams(temperature=0, max_tokens=16, logprobs=1)

    def outputs(**how: Any) -> list[object]:
        with Engine(num_blocks=64, threads=1, **how) as engine:
            made = engine.generate(prompts, greedy, progress=False)
            return [(out.outputs[0].token_ids, out.outputs[0].logprobs) for out in made]

    inline = outputs(inline=True, tensor_parallel_size=2, decode_tp=1)
    assert outputs(tensor_parallel_size=2, decode_tp=1) == inline
