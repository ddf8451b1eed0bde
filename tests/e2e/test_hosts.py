"""Several hosts without Ray: same tokens, a lost host costs nothing, strangers get nothing."""

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from bench.local_hosts import LocalHosts
from bench.procs import descendants
from diptych.server.cluster_link import AgentLink
from diptych.server.launch import Launched
from diptych.server.link_wire import Hello
from diptych.server.process_table import read_processes
from diptych.server.remote_client import RemoteClient
from diptych.server.spawn import spawn
from diptych.transfer.network import new_secret
from tests.e2e.test_separate_pools import PROMPTS, answer, ask_all, expected
from tests.support.processes import tiny_options, up, wait_for

WAIT_S = 60.0


async def until(what: str, condition: Callable[[], bool]) -> None:
    await asyncio.to_thread(wait_for, what, condition, WAIT_S)


async def settled(client: RemoteClient) -> None:
    """Nothing runs and no block is in use."""

    def at_rest() -> bool:
        stats = client.stats()
        return stats is not None and not stats.running + stats.waiting + stats.blocks_used

    before = client.stats()
    await until("a fresh report", lambda: client.stats() is not before)
    await until("all blocks are free", at_rest)


async def ask_fresh(client: RemoteClient, tag: str, num: int) -> list[list[int]]:
    """The prompts, each `num` times behind a first token of its own, so that none is cached."""
    tasks = [
        answer(client, f"{tag}-{i}-{k}", [k % 250, *prompt])
        for k in range(num)
        for i, prompt in enumerate(PROMPTS)
    ]
    return await asyncio.gather(*tasks)


async def through_a_lost_host(
    launched: Launched, hosts: LocalHosts, right: list[list[int]]
) -> None:
    client = RemoteClient(launched.api)
    run_dir = launched.api.path
    try:
        await until("the engine is ready", lambda: client.health().ok)
        assert await ask_all(client, "first") == right
        await settled(client)
        stats = client.stats()
        assert stats is not None
        assert stats.blocks_pulled >= sum(len(prompt) // 16 for prompt in PROMPTS[1:])
        assert stats.losses == 0
        calm = await ask_fresh(client, "calm", 6)

        # A worker of another host is fenced there, and comes back.
        first, second = (worker_of(run_dir, agent.pid) for agent in hosts.agents)
        pid = read_processes(run_dir)[second].pid
        assert pid is not None
        load = asyncio.create_task(ask_fresh(client, "kill", 6))
        await asyncio.sleep(0)
        os.kill(pid, signal.SIGKILL)
        assert await load == calm
        await until("it is up again", lambda: up(run_dir, second, 2))

        # The whole host is lost: its supervisor, and with it all that runs there.
        victim = hosts.agents[1]
        left = descendants(victim.pid)
        load = asyncio.create_task(ask_fresh(client, "lost", 6))
        await asyncio.sleep(0)
        victim.kill()
        assert await load == calm
        victim.wait()
        await until("its processes ended", lambda: not any(map(_lives, left)))
        assert second not in read_processes(run_dir)
        assert client.health().ok

        # Another one joins in its place, and gets new numbers.
        hosts.add(1)
        await until("worker2 is up", lambda: up(run_dir, "worker2", 1))
        assert await ask_fresh(client, "again", 6) == calm

        # A host that stands still is lost too; when it wakes up it is told so and joins anew.
        hosts.agents[0].send_signal(signal.SIGSTOP)
        load = asyncio.create_task(ask_fresh(client, "still", 6))
        await until("its worker is gone", lambda: first not in read_processes(run_dir))
        assert await load == calm
        hosts.agents[0].send_signal(signal.SIGCONT)
        await until("worker3 is up", lambda: up(run_dir, "worker3", 1))
        assert await ask_all(client, "end") == right
        await settled(client)
    finally:
        await client.close()


def worker_of(run_dir: Path, agent: int) -> str:
    """The one that runs below this agent: who joins first gets the lower number."""
    below = descendants(agent)
    return next(name for name, row in read_processes(run_dir).items() if row.pid in below)


def _lives(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.mark.timeout(180)
def test_two_hosts_through_kills_losses_and_stops(tmp_path: Path) -> None:
    right = asyncio.run(expected(tmp_path))
    hosts = LocalHosts([(1, 0), (0, 1)])
    options = msgspec.structs.replace(tiny_options(tmp_path), hang_s=3.0)
    with hosts.engine(options) as launched:
        check_strangers(hosts)
        asyncio.run(through_a_lost_host(launched, hosts, right))
    assert [agent.returncode for agent in hosts.agents] == [0, -signal.SIGKILL, 0]


def check_strangers(hosts: LocalHosts) -> None:
    """Who has not the key joins nothing and is told why."""
    boot = hosts.boot(0, secret=new_secret())
    agent = spawn("diptych.server.host_agent", boot, [])
    assert agent.wait(30) == 1
    name = b"a stranger"
    link = AgentLink(hosts.endpoint, hosts.secret, name)
    try:  # a member that speaks another version is refused with the reason
        link.send(Hello("0.0.0", "127.0.0.9", "", 1, 0, 0, False))
        seen: list[object] = []
        wait_for("an answer", lambda: bool(seen.extend(link.receive()) or seen))
        assert "diptych" in str(seen[0])
    finally:
        link.close(0)
