"""`diptych serve --ray` as a Ray job on two nodes, P on one and D on the other.

A node is removed under load and another one joins; at the end Ray's control process is killed.
"""

import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.procs import descendants
from diptych import Engine, SamplingParams
from tests.support.processes import MARK, marked_processes
from tests.support.ray_nodes import free_port

WAIT_S = 90.0
NUM_TOKENS = 48
PROMPTS = [f"Question {i}: what is {i} + {7 * i}? " * 12 for i in range(12)]


class Nodes:
    """The cluster's process; `env` is what every client of it needs."""

    def __init__(self) -> None:
        self._mark = uuid.uuid4().hex
        self.env = {
            **os.environ,
            MARK: self._mark,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "PYTHONWARNINGS": "ignore",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.ray_nodes"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self.env,
            text=True,
        )
        addresses = self._answer()
        self.address, self.dashboard = addresses["address"], addresses["dashboard"]

    def order(self, word: str) -> None:
        assert self.process.stdin is not None
        print(word, file=self.process.stdin, flush=True)
        self._answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        below = list(descendants(self.process.pid))
        self.process.stdin.close()
        self.process.kill()  # without a control process nothing of it would end in order
        self.process.wait()
        below += [int(row.split()[0]) for row in marked_processes(self._mark)]
        for pid in below:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.stdout.close()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                row: dict[str, Any] = json.loads(line)
                return row
        raise AssertionError(f"the cluster ended: {self.process.wait()}")


@contextmanager
def ray_nodes() -> Iterator[Nodes]:
    nodes = Nodes()
    try:
        yield nodes
    finally:
        nodes.close()


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


async def answer(client: httpx.AsyncClient, prompt: str) -> str:
    """Streamed; the stream must end as it should."""
    body = {
        "model": "diptych-builtin",
        "prompt": prompt,
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    text, done = "", False
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                done = True
            elif line.startswith("data: "):
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, chunk
                text += "".join(choice["text"] for choice in chunk["choices"])
    assert done
    return text


async def info(client: httpx.AsyncClient) -> dict[str, Any]:
    row: dict[str, Any] = (await client.get("/server_info")).json()
    return row


async def until_workers(client: httpx.AsyncClient, dials: list[list[int]]) -> list[int]:
    """Waits until the server is healthy with workers of one of these dials."""
    until_s = time.monotonic() + WAIT_S
    seen: object = None
    while time.monotonic() < until_s:
        try:
            seen = row = await info(client)
            engine = row["engine"]
            found = [] if engine is None else sorted(worker["dial"] for worker in engine["workers"])
            if row["health"]["ok"] and found in dials:
                return found
        except httpx.TransportError as error:
            seen = error
        await asyncio.sleep(0.1)
    raise AssertionError(f"not within {WAIT_S:g} s: {dials}; {seen}")


async def scenario(nodes: Nodes, port: int, right: list[str]) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:

        async def ask_all() -> list[str]:
            return await asyncio.gather(*(answer(client, prompt) for prompt in PROMPTS))

        await until_workers(client, [[0, 100]])
        assert await ask_all() == right
        engine = (await info(client))["engine"]
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
