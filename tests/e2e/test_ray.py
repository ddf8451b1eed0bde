"""`diptych serve --ray` as a Ray job on two nodes, P on one and D on the other.

A node is removed under load and another one joins; at the end Ray's control process is killed.
With autoscaling, bundles are asked for and given back, down to none and up again.
"""

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from bench.ray_nodes import Nodes, free_port, ray_nodes
from bench.raylets import answer, info, until_workers
from diptych import Engine, SamplingParams

WAIT_S = 90.0
NUM_TOKENS = 48
PROMPTS = [f"Question {i}: what is {i} + {7 * i}? " * 12 for i in range(12)]


def submit(nodes: Nodes, *words: str) -> None:
    """As `ray job submit` on a command line."""
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    command = [*ray, "job", "submit", "--address", nodes.dashboard, "--no-wait", "--", *words]
    until_s = time.monotonic() + WAIT_S
    while True:  # refused until the node's own agent has registered
        ended = subprocess.run(command, env=nodes.env, timeout=60, capture_output=True, text=True)
        if ended.returncode == 0:
            return
        assert time.monotonic() < until_s, ended.stdout + ended.stderr


async def scenario(nodes: Nodes, port: int, right: list[str]) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:

        async def ask_all() -> list[str]:
            return await asyncio.gather(*(answer(client, prompt, NUM_TOKENS) for prompt in PROMPTS))

        await until_workers(client, [[0, 100]])
        assert await ask_all() == right
        for _ in range(100):  # the scheduler says its sums some times a second
            if (engine := (await info(client))["engine"])["prefill_tokens"]:
                break
            await asyncio.sleep(0.05)
        assert engine["blocks_pulled"] > 0, "P and D are on two nodes: KV must have moved"
        load = asyncio.create_task(ask_all())
        more = asyncio.create_task(ask_all())
        await asyncio.to_thread(nodes.order, "remove")
        assert await load == right
        assert await more == right
        await until_workers(client, [[0], [100]])
        assert await ask_all() == right
        await asyncio.to_thread(nodes.order, "add")
        await until_workers(client, [[0, 100]])
        assert await ask_all() == right
        await asyncio.to_thread(nodes.order, "gcs")
        for _ in range(3):
            assert await ask_all() == right


@pytest.mark.timeout(240)
def test_p_and_d_on_two_nodes_and_one_is_removed(tmp_path: Path) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    with Engine(inline=True) as engine:
        right = [output.outputs[0].text for output in engine.generate(PROMPTS, greedy)]
    port = free_port()
    with ray_nodes() as nodes:
        words = ["serve", "--ray", "--prefill", "1", "--decode", "1", "--threads", "1", "--port"]
        submit(nodes, sys.executable, "-m", "diptych.server.cli", *words, str(port))
        asyncio.run(scenario(nodes, port, right))


_GROUPS = """
import json, ray
from ray.util.placement_group import placement_group_table
ray.init(address="auto", logging_level="ERROR", log_to_driver=False)
print(json.dumps([g["state"] for g in placement_group_table().values()]))
"""


def bundles_held(nodes: Nodes) -> int:
    """Placement groups that Ray has not been given back."""
    env = {**nodes.env, "RAY_ADDRESS": nodes.address}
    words = [sys.executable, "-c", _GROUPS]
    done = subprocess.run(words, env=env, timeout=60, capture_output=True, text=True, check=True)
    return sum(state != "REMOVED" for state in json.loads(done.stdout.splitlines()[-1]))


async def to_zero_and_back(nodes: Nodes, port: int, right: list[str]) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=90) as client:

        async def ask_all() -> list[str]:
            return await asyncio.gather(*(answer(client, prompt, NUM_TOKENS) for prompt in PROMPTS))

        await until_workers(client, [[50]])
        assert await ask_all() == right
        for _ in range(2):
            await until_workers(client, [[]])
            for _ in range(20):
                if not (held := await asyncio.to_thread(bundles_held, nodes)):
                    break
            assert held == 0, "the bundles are given back"
            assert await answer(client, PROMPTS[0], NUM_TOKENS) == right[0], "it waits for a worker"
        assert await ask_all() == right


@pytest.mark.timeout(240)
def test_bundles_are_asked_for_and_given_back(tmp_path: Path) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    with Engine(inline=True) as engine:
        right = [output.outputs[0].text for output in engine.generate(PROMPTS, greedy)]
    port = free_port()
    with ray_nodes() as nodes:
        words = ["serve", "--ray", "--autoscale", "0:2", "--mixed", "1", "--threads", "1"]
        words += ["--scale-down-delay", "1", "--port", str(port)]
        submit(nodes, sys.executable, "-m", "diptych.server.cli", *words)
        asyncio.run(to_zero_and_back(nodes, port, right))
