"""Cores of a host, shared by real workers: where their threads sit, and that tokens stay equal."""

import asyncio
import os
from pathlib import Path

import msgspec
import pytest

from diptych.engine.core.config import EngineOptions
from diptych.engine.core.errors import ConfigError
from diptych.engine.core.params import SamplingParams
from diptych.server.hosting import host_engine
from diptych.server.launch import start_engine
from diptych.server.process_table import read_processes
from tests.support.processes import tiny_options

PARAMS = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
PROMPTS = [[(3 + 7 * i * (k + 1)) % 250 for i in range(200)] for k in range(6)]


def affinities(pid: int) -> list[set[int]]:
    """Of every thread that computes: the first, and the helpers of its name."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        if int(task.name) == pid or (task / "comm").read_text().strip() == "dt-compute":
            found.append(os.sched_getaffinity(int(task.name)))
    return found


async def answers(options: EngineOptions) -> tuple[list[list[int]], list[set[int]]]:
    """Tokens of all prompts at once, and the affinities of the workers' threads."""
    hosted = await host_engine(options, inline=False)
    try:

        async def one(number: int) -> list[int]:
            stream = hosted.client.stream(f"r{number}", PROMPTS[number], PARAMS)
            return [token async for delta in stream for token in delta.ids]

        tokens = await asyncio.gather(*(one(number) for number in range(len(PROMPTS))))
        assert hosted.launched is not None
        rows = read_processes(Path(hosted.launched.api.run_dir))
        pids = [row.pid for name, row in rows.items() if name.startswith("worker")]
        assert len(pids) == 4
        return tokens, [cores for pid in pids for cores in affinities(pid)]
    finally:
        await hosted.close()


def test_workers_share_the_cores_they_are_given(tmp_path: Path) -> None:
    """Four workers, on one core and on all: every thread is pinned within, no token differs."""
    machine = sorted(os.sched_getaffinity(0))
    options = msgspec.structs.replace(
        tiny_options(tmp_path, prefill=2, decode=2), threads=None, cpu_cores=None
    )
    tokens, everywhere = asyncio.run(answers(options))
    assert all(len(cores) == 1 and cores <= set(machine) for cores in everywhere)
    last = machine[-1]
    bounded = msgspec.structs.replace(options, cpu_cores=f"{last}-{last}")
    same, there = asyncio.run(answers(bounded))
    assert same == tokens
    assert all(cores == {last} for cores in there)


def test_cores_that_are_not_there_are_refused(tmp_path: Path) -> None:
    options = msgspec.structs.replace(tiny_options(tmp_path), cpu_cores="99999-99999")
    with pytest.raises(ConfigError, match="may not use core 99999"):
        start_engine(options)
