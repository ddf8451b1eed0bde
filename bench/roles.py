"""`python -m bench.roles`: workers that move between prefill and decode, against every fixed split;
and the way from no worker to one and back, by stage.

The load is a square wave: a phase of long prompts with short answers, then one of short prompts
with long answers, as an open loop of seeded Poisson arrivals, the same for every run. Rates and
targets come from what one worker does alone, measured first. A request attains its targets if its
first token came within the TTFT target and the mean gap of its other tokens within the ITL target.
Every worker has one thread, as if each had a device of its own. The model has random weights.
"""

import argparse
import asyncio
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from bench.models import write_model
from bench.record import spread, write
from diptych.engine.core.config import (
    BatchOptions,
    CacheOptions,
    EngineOptions,
    ModelOptions,
    SchedulerOptions,
)
from diptych.engine.core.errors import DiptychError
from diptych.engine.core.messages import ColdStart
from diptych.engine.core.params import SamplingParams
from diptych.server.builtin import BUILTIN_MODEL
from diptych.server.client import EngineClient
from diptych.server.hosting import host_engine

LONG_PROMPT: Final = 512
LONG_ANSWER: Final = 96
SHORT: Final = 16  # the other side of both phases
BATCH: Final = 12  # decodes of one worker that the ITL target is made for


@dataclass(slots=True, frozen=True)
class Arrival:
    at_s: float
    prompt: list[int]
    max_tokens: int
    phase: str


@dataclass(slots=True)
class Answer:
    arrival: Arrival
    sent_s: float
    times_s: list[float] = field(default_factory=list)  # of each token
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        return self.times_s[0] - self.sent_s

    @property
    def itl_s(self) -> float:
        return (self.times_s[-1] - self.times_s[0]) / max(1, len(self.times_s) - 1)

    def attains(self, ttft_s: float, itl_s: float) -> bool:
        done = self.error is None and len(self.times_s) == self.arrival.max_tokens
        return done and self.ttft_s <= ttft_s and self.itl_s <= itl_s


@dataclass(slots=True, frozen=True)
class Plan:
    ttft_slo_s: float
    itl_slo_s: float
    arrivals: list[Arrival]


async def ask(client: EngineClient, name: str, arrival: Arrival) -> Answer:
    params = SamplingParams(temperature=0.0, max_tokens=arrival.max_tokens, ignore_eos=True)
    answer = Answer(arrival, time.perf_counter())
    try:
        async for delta in client.stream(name, arrival.prompt, params):
            now = time.perf_counter()
            answer.times_s += [now] * len(delta.ids)
    except DiptychError as error:
        answer.error = error.message
    return answer


async def play(client: EngineClient, arrivals: Sequence[Arrival]) -> list[Answer]:
    """Every arrival at its time, whatever the server does."""
    start_s = time.perf_counter()
    tasks = []
    for number, arrival in enumerate(arrivals):
        await asyncio.sleep(max(0.0, start_s + arrival.at_s - time.perf_counter()))
        tasks.append(asyncio.create_task(ask(client, f"0-{number}-roles", arrival)))
    return await asyncio.gather(*tasks)


def prompt_of(rng: random.Random, length: int) -> list[int]:
    return rng.choices(range(3, 250), k=length)


async def calibrate(options: EngineOptions, args: argparse.Namespace) -> Plan:
    """What one worker does alone gives the targets and the rates."""
    rng = random.Random(args.seed)
    alone = msgspec.structs.replace(options, prefill=0, decode=0, mixed=1)
    hosted = await host_engine(alone, inline=False)
    try:
        client = hosted.client
        await ask(client, "0-w-roles", Arrival(0.0, prompt_of(rng, LONG_PROMPT), 8, "warm"))
        singles = [
            await ask(client, f"0-p{i}-roles", Arrival(0.0, prompt_of(rng, LONG_PROMPT), 2, "p"))
            for i in range(4)
        ]
        prefill_s = min(answer.ttft_s for answer in singles)
        batch = [Arrival(0.0, prompt_of(rng, SHORT), LONG_ANSWER, "d") for _ in range(BATCH)]
        itl_s = max(answer.itl_s for answer in await play(client, batch))
    finally:
        await hosted.close()
    rates = {  # per second, for all workers together
        "prefill": args.load * args.workers / prefill_s,
        "decode": args.load * args.workers * BATCH / (LONG_ANSWER * itl_s),
    }
    arrivals: list[Arrival] = []
    for period in range(args.periods):
        for half, (phase, rate) in enumerate(rates.items()):
            at_s = (2 * period + half) * args.phase_s
            end_s = at_s + args.phase_s
            while (at_s := at_s + rng.expovariate(rate)) < end_s:
                long = phase == "prefill"
                prompt = prompt_of(rng, LONG_PROMPT if long else SHORT)
                arrivals.append(Arrival(at_s, prompt, SHORT if long else LONG_ANSWER, phase))
    return Plan(6.0 * prefill_s, 1.5 * itl_s, arrivals)


@dataclass(slots=True)
class Played:
    """One way to run, over all its rounds."""

    rounds: list[list[Answer]] = field(default_factory=list)
    dial_moves: int = 0
    losses: int = 0


async def run(options: EngineOptions, plan: Plan, played: Played) -> None:
    hosted = await host_engine(options, inline=False)
    try:
        await ask(hosted.client, "0-w-roles", Arrival(0.0, list(range(3, 99)), 8, "warm"))
        played.rounds.append(await play(hosted.client, plan.arrivals))
        stats = hosted.client.stats()
        assert stats is not None
        played.dial_moves += stats.dial_moves
        played.losses += stats.losses
    finally:
        await hosted.close()


def summary(played: Played, plan: Plan) -> dict[str, object]:
    targets = (plan.ttft_slo_s, plan.itl_slo_s)
    answers = [answer for round_ in played.rounds for answer in round_]
    good = [answer for answer in answers if answer.times_s]
    share = {
        phase: attained([a for a in answers if a.arrival.phase == phase], targets)
        for phase in ("prefill", "decode")
    }
    return {
        "attained": spread([attained(round_, targets) for round_ in played.rounds]),
        "attained_by_phase": share,
        "ttft_ms": _percentiles([answer.ttft_s * 1e3 for answer in good]),
        "itl_ms": _percentiles([answer.itl_s * 1e3 for answer in good]),
        "requests": len(answers),
        "lost": sum(a.error is not None or len(a.times_s) != a.arrival.max_tokens for a in answers),
        "dial_moves": played.dial_moves,
        "losses": played.losses,
    }


def attained(answers: Sequence[Answer], targets: tuple[float, float]) -> float:
    return round(sum(answer.attains(*targets) for answer in answers) / max(1, len(answers)), 4)


def _percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        f"p{share}": round(ordered[min(len(ordered) - 1, len(ordered) * share // 100)], 1)
        for share in (50, 90, 99)
    }


async def zero(rounds: int) -> list[tuple[float, ColdStart]]:
    """(seconds to the first token of the request that woke it, stages), from no worker each."""
    scheduler = SchedulerOptions(autoscale=(0, 1), idle_s=0.5, steer_s=0.25)
    options = EngineOptions(
        model=ModelOptions(path=str(BUILTIN_MODEL)),
        cache=CacheOptions(memory_bytes=64 << 20),
        scheduler=scheduler,
        prefill=0,
        decode=0,
        mixed=1,
    )
    hosted = await host_engine(options, inline=False)
    found = []
    try:
        for number in range(rounds):
            while (stats := hosted.client.stats()) is None or stats.workers:
                await asyncio.sleep(0.02)
            await asyncio.sleep(1.0)
            before = stats.cold_start
            arrival = Arrival(0.0, list(range(3, 40)), 8, "wake")
            answer = await ask(hosted.client, f"0-z{number}-roles", arrival)
            assert answer.error is None, answer.error
            while (stats := hosted.client.stats()) is None or stats.cold_start in (before, None):
                await asyncio.sleep(0.02)
            assert stats.cold_start is not None
            found.append((answer.ttft_s, stats.cold_start))
    finally:
        await hosted.close()
    return found


def _stages(found: list[tuple[float, ColdStart]]) -> dict[str, object]:
    names = ("asked_s", "import_s", "weights_s", "fork_s", "ready_s", "join_s", "total_s")
    stages = {name: spread([getattr(start, name) for _, start in found]) for name in names}
    return {"ttft_from_zero_s": spread([ttft_s for ttft_s, _ in found]), **stages}


def runs(options: EngineOptions, workers: int, plan: Plan) -> dict[str, EngineOptions]:
    """Every fixed split, all workers mixed, the same with steps that keep the ITL target, and the
    controller (which has that too) from the middle."""
    found = {
        f"{n}P{workers - n}D": msgspec.structs.replace(options, prefill=n, decode=workers - n)
        for n in range(1, workers)
    }
    found[f"{workers}M"] = msgspec.structs.replace(options, prefill=0, decode=0, mixed=workers)
    pace = msgspec.structs.replace(options.batch, itl_slo_s=plan.itl_slo_s)
    found[f"{workers}M paced"] = msgspec.structs.replace(found[f"{workers}M"], batch=pace)
    middle = found[f"{workers // 2}P{workers - workers // 2}D"]
    scheduler = msgspec.structs.replace(
        options.scheduler, ttft_slo_s=plan.ttft_slo_s, itl_slo_s=plan.itl_slo_s
    )
    batch = msgspec.structs.replace(options.batch, itl_slo_s=scheduler.pace_s)
    found["controller"] = msgspec.structs.replace(middle, scheduler=scheduler, batch=batch)
    return found


async def main_async(args: argparse.Namespace) -> dict[str, object]:
    result: dict[str, object] = {}
    if not args.only_zero:
        with tempfile.TemporaryDirectory() as folder:
            model = write_model(
                Path(folder) / "model",
                "tiny",
                hidden_size=512,
                num_hidden_layers=8,
                num_attention_heads=8,
                intermediate_size=1536,
            )
            options = EngineOptions(
                model=ModelOptions(path=str(model), load_format="dummy"),
                cache=CacheOptions(memory_bytes=256 << 20, enable_prefix_caching=False),
                batch=BatchOptions(max_num_batched_tokens=256),
                threads=1,
            )
            plan = await calibrate(options, args)
            result["targets_ms"] = {
                "ttft": round(plan.ttft_slo_s * 1e3, 1),
                "itl": round(plan.itl_slo_s * 1e3, 2),
            }
            result["load"] = {
                "workers": args.workers,
                "share_of_capacity": args.load,
                "phase_s": args.phase_s,
                "periods": args.periods,
                "rounds": args.rounds,
            }
            ways = runs(options, args.workers, plan)
            played = {name: Played() for name in ways}
            for _ in range(args.rounds):
                for name, each in ways.items():
                    await run(each, plan, played[name])
                    print(name, summary(played[name], plan), flush=True)
            result["runs"] = {name: summary(each, plan) for name, each in played.items()}
    if args.zero_rounds:
        result["scale_to_zero"] = _stages(await zero(args.zero_rounds))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.roles", description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--load", type=float, default=0.65, help="share of all workers' capacity")
    parser.add_argument("--phase-s", type=float, default=8.0)
    parser.add_argument("--periods", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2, help="of all runs, taking turns")
    parser.add_argument("--zero-rounds", type=int, default=3, help="ways from no worker to one")
    parser.add_argument("--only-zero", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    write(args.out, asyncio.run(main_async(args)))


if __name__ == "__main__":
    main()
