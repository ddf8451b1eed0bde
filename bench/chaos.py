"""Kills or stops random processes under load, and looks for anything a client could notice.

`--kills` are SIGKILLs, `--stops` are SIGSTOPs (a process that stands still: it must be found out
and fenced), mixed at random when both are given. Every request is compared with what an undisturbed
engine gave for it. At the end nothing may be left: no block in use, no process, no shared memory,
no run directory.
"""

import argparse
import asyncio
import os
import random
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, get_args

from bench.losslessness import Answer, ask, prompt_of
from bench.models import write_model
from bench.procs import descendants, engine_processes, shared_segments
from bench.record import write
from diptych.engine.core.config import CacheOptions, EngineOptions, ModelOptions, Transfer
from diptych.engine.core.errors import DiptychError, OverloadedError
from diptych.engine.core.params import SamplingParams
from diptych.server.client import EngineClient
from diptych.server.hosting import Hosted, host_engine
from diptych.server.load.report import percentile

_NUM_KINDS: Final = 24
_REST_S_MAX: Final = 10.0
STOP_S: Final = 1.0  # between a signal and the next SIGSTOP: a hang takes seconds to be found out


@dataclass(slots=True)
class Tally:
    completed: int = 0
    refused: int = 0  # 429, never accepted: while a new scheduler places the backlog
    failed: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)  # the longest of each stream

    def report(self) -> dict[str, object]:
        """What clients saw, as a part of a recorded result."""
        return {
            "requests_completed": self.completed,
            "requests_refused_429": self.refused,
            "requests_failed": self.failed,
            "requests_wrong": self.wrong,
            "longest_gap_s": {
                "p50": percentile(self.gaps_s, 50),
                "p99": percentile(self.gaps_s, 99),
                "max": max(self.gaps_s),
            },
        }


def kinds(seed: int) -> list[tuple[list[int], SamplingParams]]:
    """Different prompts and parameters, some sharing a prefix."""
    rng = random.Random(seed)
    shared = prompt_of("shared", 200)
    rows = []
    for index in range(_NUM_KINDS):
        own = prompt_of(f"own {index}", rng.randrange(1, 400))
        params = SamplingParams(
            n=rng.choice([1, 1, 1, 2]),
            temperature=rng.choice([0.0, 0.8, 1.0]),
            top_p=rng.choice([1.0, 0.9]),
            seed=index,
            max_tokens=rng.randrange(8, 200),
            logprobs=rng.choice([None, 2]),
            ignore_eos=rng.random() < 0.7,
        )
        rows.append((shared + own if index % 2 else own, params))
    return rows


async def reference(options: EngineOptions, seed: int) -> list[Answer]:
    hosted = await host_engine(options, inline=True)
    try:
        rows = kinds(seed)
        return [
            await ask(hosted.client, str(i), prompt, params, salt="")
            for i, (prompt, params) in enumerate(rows)
        ]
    finally:
        await hosted.close()


async def timed_ask(
    client: EngineClient, name: str, prompt: list[int], params: SamplingParams, tally: Tally
) -> Answer:
    """As `ask`, and notes the longest gap between two pieces of the stream."""
    answer = Answer([[] for _ in range(params.n)], [[] for _ in range(params.n)])
    last = time.perf_counter()
    longest = 0.0
    async for delta in client.stream(name, prompt, params):
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
        assert delta.first_index == len(answer.ids[delta.choice]), "a gap or an overlap"
        answer.ids[delta.choice] += delta.ids
        answer.logprobs[delta.choice] += delta.logprobs or []
    tally.gaps_s.append(longest)
    return answer


async def user(
    number: int,
    client: EngineClient,
    seed: int,
    expected: list[Answer],
    tally: Tally,
    stop: asyncio.Event,
) -> None:
    """One client that asks again and again until told to stop."""
    rng = random.Random(f"{seed} user {number}")
    rows = kinds(seed)
    count = 0
    while not stop.is_set():
        count += 1
        kind = rng.randrange(len(rows))
        name = f"u{number}-{count}"
        try:
            answer = await timed_ask(client, name, *rows[kind], tally)
        except OverloadedError as error:
            tally.refused += 1
            await asyncio.sleep(min(error.retry_after_s, 0.5))
            continue
        except (DiptychError, AssertionError) as error:
            tally.failed.append(f"{name} kind {kind}: {error!r}")
            continue
        tally.completed += 1
        if answer != expected[kind]:
            tally.wrong.append(f"{name} kind {kind}")


def targets(supervisor: int, kinds: Sequence[str]) -> dict[str, int]:
    """Name -> pid of what may be disturbed now: processes of these kinds ("worker", ...)."""
    return {
        name: pid
        for name, pid in engine_processes(supervisor).items()
        if name.startswith(tuple(kinds))
    }


async def disturb(hosted: Hosted, args: argparse.Namespace) -> dict[str, int]:
    """Sends the signals, each to a random process; returns how many of which kind each got."""
    rng = random.Random(f"{args.seed} killer")
    assert hosted.launched is not None
    signals = [signal.SIGKILL] * args.kills + [signal.SIGSTOP] * args.stops
    rng.shuffle(signals)
    sent: dict[str, int] = {}
    while signals:
        await asyncio.sleep(rng.uniform(0.05, 0.6) if signals[-1] == signal.SIGKILL else STOP_S)
        found = targets(hosted.launched.supervisor_pid, args.targets)
        if not found:
            continue
        name = rng.choice(sorted(found))
        try:
            os.kill(found[name], signals[-1])
        except ProcessLookupError:
            continue
        what = f"{name} {signals.pop().name}"
        sent[what] = sent.get(what, 0) + 1
    return dict(sorted(sent.items()))


async def blocks_at_rest(hosted: Hosted) -> int | None:
    """Blocks in use once nothing runs; None if the engine does not come to rest."""
    deadline = time.monotonic() + _REST_S_MAX
    while time.monotonic() < deadline:
        stats = hosted.client.stats()
        if stats is not None and hosted.client.health().ok and not stats.running + stats.waiting:
            if stats.blocks_used == 0:
                return 0
        await asyncio.sleep(0.05)
    stats = hosted.client.stats()
    return stats.blocks_used if stats is not None else None


async def run(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    prefill, decode = args.prefill, args.decode
    model = ModelOptions(path=str(folder), load_format="dummy")
    cache = CacheOptions(num_blocks=args.num_blocks)
    options = EngineOptions(
        model=model,
        cache=cache,
        prefill=prefill,
        decode=decode,
        separate_pools=args.transfer is not None,
        transfer=args.transfer or "auto",
        threads=1,
    )
    inline = EngineOptions(model=model, prefill=0, decode=0, mixed=1, threads=1)
    expected = await reference(inline, args.seed)
    segments = shared_segments()
    hosted = await host_engine(options, inline=False)
    assert hosted.launched is not None
    run_dir = hosted.launched.api.path
    tally, stop = Tally(), asyncio.Event()
    users = [
        asyncio.create_task(user(i, hosted.client, args.seed, expected, tally, stop))
        for i in range(args.users)
    ]
    start = time.monotonic()
    sent = await disturb(hosted, args)
    stop.set()
    await asyncio.gather(*users)
    seconds = time.monotonic() - start
    blocks = await blocks_at_rest(hosted)
    processes = descendants(hosted.launched.supervisor_pid)
    await hosted.close()
    alive = [pid for pid in processes if Path(f"/proc/{pid}").exists()]
    return {
        "seed": args.seed,
        "seconds": seconds,
        "signals": sent,
        **tally.report(),
        "blocks_leaked": blocks,
        "processes_left": len(alive),
        "segments_left": sorted(shared_segments() - segments),
        "run_dir_left": run_dir.exists(),
    }


def clean(result: dict[str, object]) -> bool:
    bad = ("requests_failed", "requests_wrong", "processes_left", "segments_left", "run_dir_left")
    return not any(result[key] for key in bad) and result["blocks_leaked"] == 0


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--stops", type=int, default=0)
    parser.add_argument(
        "--targets", nargs="+", default=["worker", "scheduler"], help="kinds of processes"
    )
    parser.add_argument("--users", type=int, default=12)
    parser.add_argument("--prefill", type=int, default=2)
    parser.add_argument("--decode", type=int, default=2)
    parser.add_argument("--num-blocks", type=int, default=1024)
    parser.add_argument("--transfer", choices=get_args(Transfer), help="separate pools")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


def main() -> int:
    args = parse()
    with tempfile.TemporaryDirectory() as folder:
        result = asyncio.run(run(write_model(Path(folder), "tiny"), args))
    write(args.out, result)
    return 0 if clean(result) else 1


if __name__ == "__main__":
    raise SystemExit(main())
