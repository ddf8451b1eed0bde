"""A Ray node is lost again and again under load: its raylet is killed, another joins in its place.

Two Ray nodes on this machine, a prefill worker on one and a decode worker on the other, served by
`diptych serve --ray` and asked over HTTP. Every answer is compared with what the engine inside this
process gave.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

import httpx

from bench.chaos import Tally
from bench.procs import shared_segments
from bench.ray_nodes import Nodes, free_port, ray_nodes
from bench.record import write
from diptych import Engine, SamplingParams

WAIT_S: Final = 90.0
_PROMPTS: Final = [f"Question {i}: what is {i} + {7 * i}? " * 12 for i in range(12)]
_NUM_TOKENS: Final = 96


async def answer(
    client: httpx.AsyncClient, prompt: str, num_tokens: int, gaps_s: list[float] | None = None
) -> str:
    """Streamed; the stream must end as it should. Its longest gap is added to `gaps_s`."""
    body = {
        "model": "diptych-builtin",
        "prompt": prompt,
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    text, done = "", False
    last, longest = time.monotonic(), 0.0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            now = time.monotonic()
            longest, last = max(longest, now - last), now
            if line == "data: [DONE]":
                done = True
            elif line.startswith("data: "):
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, chunk
                text += "".join(choice["text"] for choice in chunk["choices"])
    assert done
    if gaps_s is not None:
        gaps_s.append(longest)
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


async def user(
    number: int, client: httpx.AsyncClient, right: list[str], tally: Tally, stop: asyncio.Event
) -> None:
    count = number
    while not stop.is_set():
        kind = count % len(_PROMPTS)
        count += 5
        try:
            text = await answer(client, _PROMPTS[kind], _NUM_TOKENS, tally.gaps_s)
        except (AssertionError, httpx.HTTPError) as error:
            tally.failed.append(repr(error))
            continue
        tally.completed += 1
        if text != right[kind]:
            tally.wrong.append(_PROMPTS[kind][:16])


async def lose_nodes(nodes: Nodes, port: int, right: list[str], args: argparse.Namespace) -> Tally:
    tally, stop = Tally(), asyncio.Event()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        await until_workers(client, [[0, 100]])
        users = [
            asyncio.create_task(user(i, client, right, tally, stop)) for i in range(args.users)
        ]
        for _ in range(args.losses):
            await asyncio.to_thread(nodes.order, "raylet")
            await until_workers(client, [[0], [100]])
            await asyncio.to_thread(nodes.order, "add")
            await until_workers(client, [[0, 100]])
        stop.set()
        await asyncio.gather(*users)
        while (row := await info(client))["engine"]["running"]:
            await asyncio.sleep(0.05)
        assert row["engine"]["blocks_used"] == 0, row
    return tally


def run(args: argparse.Namespace) -> dict[str, object]:
    greedy = SamplingParams(temperature=0, max_tokens=_NUM_TOKENS, ignore_eos=True)
    with Engine(inline=True) as engine:
        right = [output.outputs[0].text for output in engine.generate(_PROMPTS, greedy)]
    segments, port, start = shared_segments(), free_port(), time.monotonic()
    words = ["serve", "--ray", "--prefill", "1", "--decode", "1", "--threads", "1", "--port"]
    with ray_nodes() as nodes:
        command = [sys.executable, "-m", "diptych.server.cli", *words, str(port)]
        env = {**nodes.env, "RAY_ADDRESS": nodes.address}
        with subprocess.Popen(command, env=env) as server:
            try:
                tally = asyncio.run(lose_nodes(nodes, port, right, args))
            finally:
                server.terminate()
    return {
        "nodes_lost": args.losses,
        "seconds": time.monotonic() - start,
        **tally.report(),
        "segments_left": sorted(
            name for name in shared_segments() - segments if not name.startswith("plasma")
        ),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--losses", type=int, default=20)
    parser.add_argument("--users", type=int, default=6)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result = run(args)
    write(args.out, result)
    return 1 if result["requests_failed"] or result["requests_wrong"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
