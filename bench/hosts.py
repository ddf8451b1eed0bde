"""Several hosts under load, and signals to random processes of all of them.

A head and `--hosts` agents on this machine, each at a loopback address of its own, with one prefill
and one decode worker and a pool of its own. Two phases, told apart in the result: SIGKILLs of
workers, schedulers and NIXL processes; then SIGSTOPs of the same, and lost hosts. A killed agent
takes its whole host with it and is started anew; a stopped one is taken for lost while its workers
run on as zombies, then goes on, is told so and joins again. Every answer is compared with what an
undisturbed engine gave. At the end nothing may be left.
"""

import argparse
import asyncio
import os
import random
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from bench.chaos import STOP_S, Tally, clean, reference, user
from bench.local_hosts import LocalHosts
from bench.losslessness import Answer
from bench.models import write_model
from bench.procs import descendants, engine_pids, shared_segments
from bench.record import write
from diptych.engine.core.config import CacheOptions, EngineOptions, ModelOptions
from diptych.server.launch import Launched
from diptych.server.remote_client import RemoteClient

_STOPPED_S: Final = 6.0  # longer than a host may be silent
_JOIN_S_MAX: Final = 90.0
_REST_S_MAX: Final = 20.0


class Disturber:
    """Sends the signals, and starts again what nobody else would."""

    def __init__(self, launched: Launched, hosts: LocalHosts, seed: int) -> None:
        self._launched = launched
        self._hosts = hosts
        self._rng = random.Random(f"{seed} disturber")
        self._living = dict(enumerate(hosts.agents))  # number -> agent

    async def run(self, client: RemoteClient, signals: dict[str, int]) -> dict[str, int]:
        """`signals`: what ("kill", "stop", "kill agent", "stop agent") -> how often. Returns how
        many signals processes of each kind got."""
        todo = [what for what, count in signals.items() for _ in range(count)]
        self._rng.shuffle(todo)
        sent: dict[str, int] = {}
        for what in todo:
            pause_s = STOP_S if what == "stop" else self._rng.uniform(0.05, 0.5)
            await asyncio.sleep(pause_s)
            kind = await self._send(what, client)
            name = f"{kind} {'SIGKILL' if what.startswith('kill') else 'SIGSTOP'}"
            sent[name] = sent.get(name, 0) + 1
        return dict(sorted(sent.items()))

    async def _send(self, what: str, client: RemoteClient) -> str:
        if what in ("kill", "stop"):
            return await self._to_random(signal.SIGKILL if what == "kill" else signal.SIGSTOP)
        number = self._rng.choice(sorted(self._living))
        agent = self._living[number]
        if what == "kill agent":
            agent.kill()
            await self._again(number, client)
        else:
            agent.send_signal(signal.SIGSTOP)
            await asyncio.sleep(_STOPPED_S)
            agent.send_signal(signal.SIGCONT)
            await self.until_complete(client)
        return "agent"

    async def _to_random(self, number: signal.Signals) -> str:
        """The kind of process that got the signal; kinds are drawn before processes."""
        while True:
            kind = self._rng.choice(["worker", "worker", "scheduler", "nixl"])
            found = self._below(kind)
            if found:
                with suppress(ProcessLookupError):
                    os.kill(self._rng.choice(found), number)
                    return kind
            await asyncio.sleep(0.05)

    def _below(self, kind: str) -> list[int]:
        roots = [self._launched.supervisor_pid, *(a.pid for a in self._living.values())]
        return sorted(
            pid
            for root in roots
            for pid, name in engine_pids(root).items()
            if name.startswith(kind)
        )

    async def _again(self, number: int, client: RemoteClient) -> None:
        agent: subprocess.Popen[bytes] = self._living[number]
        await asyncio.to_thread(agent.wait)
        self._living[number] = self._hosts.add(number)
        await self.until_complete(client)

    async def until_complete(self, client: RemoteClient) -> None:
        """All hosts serve again, as far as the scheduler knows."""
        until_s = time.monotonic() + _JOIN_S_MAX
        while time.monotonic() < until_s:
            stats = client.stats()
            if stats is not None and len(stats.workers) == 2 * len(self._living):
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"the hosts did not come back: {client.stats()}")


async def phase(
    client: RemoteClient,
    disturber: Disturber,
    expected: list[Answer],
    args: argparse.Namespace,
    signals: dict[str, int],
) -> dict[str, object]:
    """Users ask all the while. `signals` as in `Disturber.run`."""
    tally, stop = Tally(), asyncio.Event()
    start = time.monotonic()
    users = [
        asyncio.create_task(user(i, client, args.seed, expected, tally, stop))
        for i in range(args.users)
    ]
    sent = await disturber.run(client, signals)
    stop.set()
    await asyncio.gather(*users)
    result: dict[str, object] = {"seconds": time.monotonic() - start, "signals": sent}
    return result | tally.report()


async def under_load(
    launched: Launched, hosts: LocalHosts, args: argparse.Namespace, model: ModelOptions
) -> tuple[dict[str, object], int | None]:
    inline = EngineOptions(model=model, prefill=0, decode=0, mixed=1, threads=1)
    expected = await reference(inline, args.seed)
    wanted = {
        "kills": {"kill": args.kills},
        "stops_and_lost_hosts": {
            "stop": args.stops,
            "kill agent": args.agent_kills,
            "stop agent": args.agent_stops,
        },
    }
    client = RemoteClient(launched.api)
    try:
        while not client.health().ok:
            await asyncio.sleep(0.01)
        disturber = Disturber(launched, hosts, args.seed)
        await disturber.until_complete(client)
        phases: dict[str, object] = {
            name: await phase(client, disturber, expected, args, signals)
            for name, signals in wanted.items()
            if any(signals.values())
        }
        return phases, await _blocks_at_rest(client)
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
        phases, blocks = asyncio.run(under_load(launched, hosts, args, model))
        roots = [launched.supervisor_pid, *(agent.pid for agent in hosts.agents)]
        processes = [pid for root in roots for pid in descendants(root)]
    alive = [pid for pid in processes if Path(f"/proc/{pid}").exists()]
    return {
        "seed": args.seed,
        "hosts": args.hosts,
        "transfer": args.transfer,
        **phases,
        "blocks_leaked": blocks,
        "processes_left": len(alive),
        "segments_left": sorted(shared_segments() - segments),
        "run_dir_left": run_dir.exists(),
    }


def phases_of(result: dict[str, object]) -> list[dict[str, object]]:
    return [row for row in result.values() if isinstance(row, dict) and "requests_failed" in row]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--kills", type=int, default=800)
    parser.add_argument("--stops", type=int, default=120)
    parser.add_argument("--agent-kills", type=int, default=40)
    parser.add_argument("--agent-stops", type=int, default=20)
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--num-blocks", type=int, default=1024)
    parser.add_argument("--transfer", choices=["auto", "tcp", "nixl"], default="nixl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


def main() -> int:
    args = parse()
    with tempfile.TemporaryDirectory() as folder:
        result = run(write_model(Path(folder), "tiny"), args)
    write(args.out, result)
    return 0 if all(clean(result | row) for row in phases_of(result)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
