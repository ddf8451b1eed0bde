"""Loses hosts under load: agents, workers and schedulers are killed, agents stand still, come back.

A head and `--hosts` agents on this machine, each at a loopback address of its own, with one prefill
and one decode worker and a pool of its own. A killed agent takes its whole host with it and is
started anew; a stopped one is taken for lost while its workers run on as zombies, then goes on,
is told so and joins again. Every answer is compared with what an undisturbed engine gave.
"""

import argparse
import asyncio
import os
import random
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Final

from bench.chaos import Tally, clean, reference, user
from bench.local_hosts import LocalHosts
from bench.models import write_model
from bench.procs import descendants, engine_processes, shared_segments
from bench.record import write
from diptych.engine.core.config import CacheOptions, EngineOptions, ModelOptions
from diptych.server.launch import Launched
from diptych.server.remote_client import RemoteClient

_STOPPED_S: Final = 6.0  # longer than a host may be silent
_JOIN_S_MAX: Final = 60.0
_REST_S_MAX: Final = 20.0


class Disturber:
    """Sends the signals, and starts again what nobody else would."""

    def __init__(self, launched: Launched, hosts: LocalHosts, args: argparse.Namespace) -> None:
        self.sent: dict[str, int] = {}
        self._launched = launched
        self._hosts = hosts
        self._rng = random.Random(f"{args.seed} disturber")
        self._living = dict(enumerate(hosts.agents))  # number -> agent
        self._signals = ["kill agent"] * args.agent_kills + ["stop agent"] * args.agent_stops
        self._signals += ["kill worker"] * args.worker_kills
        self._signals += ["kill scheduler"] * args.scheduler_kills
        self._rng.shuffle(self._signals)

    async def run(self, client: RemoteClient) -> None:
        for what in self._signals:
            await asyncio.sleep(self._rng.uniform(0.2, 1.0))
            number = self._rng.choice(sorted(self._living))
            agent = self._living[number]
            if what == "kill agent":
                agent.kill()
                await self._again(number, client)
            elif what == "stop agent":
                agent.send_signal(signal.SIGSTOP)
                await asyncio.sleep(_STOPPED_S)
                agent.send_signal(signal.SIGCONT)
                await self._until_complete(client)
            else:
                self._kill_below(what.removeprefix("kill "))
            self.sent[what] = self.sent.get(what, 0) + 1

    def _kill_below(self, kind: str) -> None:
        roots = [self._launched.supervisor_pid, *(a.pid for a in self._living.values())]
        pids = [
            pid
            for root in roots
            for name, pid in engine_processes(root).items()
            if name.startswith(kind)
        ]
        if pids:
            os.kill(self._rng.choice(sorted(pids)), signal.SIGKILL)

    async def _again(self, number: int, client: RemoteClient) -> None:
        agent: subprocess.Popen[bytes] = self._living[number]
        await asyncio.to_thread(agent.wait)
        self._living[number] = self._hosts.add(number)
        await self._until_complete(client)

    async def _until_complete(self, client: RemoteClient) -> None:
        """All hosts serve again, as far as the scheduler knows."""
        until_s = time.monotonic() + _JOIN_S_MAX
        while time.monotonic() < until_s:
            stats = client.stats()
            if stats is not None and len(stats.workers) == 2 * len(self._living):
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"the hosts did not come back: {client.stats()}")


async def under_load(
    launched: Launched, hosts: LocalHosts, args: argparse.Namespace, model: ModelOptions
) -> tuple[Tally, dict[str, int], float, int | None]:
    inline = EngineOptions(model=model, prefill=0, decode=0, mixed=1, threads=1)
    expected = await reference(inline, args.seed)
    client = RemoteClient(launched.api)
    try:
        while not client.health().ok:
            await asyncio.sleep(0.01)
        tally, stop = Tally(), asyncio.Event()
        users = [
            asyncio.create_task(user(i, client, args.seed, expected, tally, stop))
            for i in range(args.users)
        ]
        start = time.monotonic()
        disturber = Disturber(launched, hosts, args)
        await disturber.run(client)
        stop.set()
        await asyncio.gather(*users)
        seconds = time.monotonic() - start
        return tally, disturber.sent, seconds, await _blocks_at_rest(client)
    finally:
        await client.close()


async def _blocks_at_rest(client: RemoteClient) -> int | None:
    deadline = time.monotonic() + _REST_S_MAX
    while time.monotonic() < deadline:
        stats = client.stats()
        if stats is not None and not stats.running + stats.waiting + stats.blocks_used:
            return 0
        await asyncio.sleep(0.05)
    stats = client.stats()
    return None if stats is None else stats.blocks_used


def run(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    model = ModelOptions(path=str(folder), load_format="dummy")
    options = EngineOptions(
        model=model,
        cache=CacheOptions(num_blocks=args.num_blocks),
        prefill=args.hosts,
        decode=args.hosts,
        threads=1,
        several_hosts=True,
        transfer=args.transfer,
    )
    segments = shared_segments()
    hosts = LocalHosts([(1, 1)] * args.hosts, "ERROR")
    with hosts.engine(options) as launched:
        run_dir = launched.api.path
        tally, sent, seconds, blocks = asyncio.run(under_load(launched, hosts, args, model))
        roots = [launched.supervisor_pid, *(agent.pid for agent in hosts.agents)]
        processes = [pid for root in roots for pid in descendants(root)]
    alive = [pid for pid in processes if Path(f"/proc/{pid}").exists()]
    return {
        "seed": args.seed,
        "hosts": args.hosts,
        "transfer": args.transfer,
        "seconds": seconds,
        "signals": dict(sorted(sent.items())),
        **tally.report(),
        "blocks_leaked": blocks,
        "processes_left": len(alive),
        "segments_left": sorted(shared_segments() - segments),
        "run_dir_left": run_dir.exists(),
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--agent-kills", type=int, default=10)
    parser.add_argument("--agent-stops", type=int, default=5)
    parser.add_argument("--worker-kills", type=int, default=20)
    parser.add_argument("--scheduler-kills", type=int, default=5)
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--num-blocks", type=int, default=1024)
    parser.add_argument("--transfer", choices=["auto", "tcp", "nixl"], default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


def main() -> int:
    args = parse()
    with tempfile.TemporaryDirectory() as folder:
        result = run(write_model(Path(folder), "tiny"), args)
    write(args.out, result)
    return 0 if clean(result) else 1


if __name__ == "__main__":
    raise SystemExit(main())
