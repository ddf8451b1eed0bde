"""Scheduler and batchers in virtual time: who attains which targets under a load, without a clock.

The real machines, with made-up costs of a step: a constant, a share per decode, a share per prompt
token. Messages take a constant time. Owns the event queue; equal arguments give equal answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from random import Random

from diptych.engine.core.config import BatchOptions, CacheOptions, SchedulerOptions
from diptych.engine.core.hashing import extend_chain
from diptych.engine.core.messages import (
    Address,
    ApiUp,
    ChoiceState,
    Closed,
    Lost,
    PoolUp,
    Send,
    SetDial,
    Submit,
    TokenBatch,
    WorkerUp,
)
from diptych.engine.core.params import SamplingParams
from diptych.engine.core.plan import Sample, StepPlan, StepResult
from diptych.engine.core.request import Request
from diptych.engine.core.types import pack_ids
from diptych.scheduler.batcher import Batcher
from diptych.scheduler.commands import PoolRead, ReadPool
from diptych.scheduler.dials import Move
from diptych.scheduler.scheduler import Scheduler

EPOCH = 1
SIZE = 16
BLOCKS = 8192
ROOT = b"r" * 32
HOP_S = 2e-4
TICK_S = 0.05
TOKEN = 7
_SCHEDULER = Address("scheduler", 0, EPOCH)


@dataclass(frozen=True)
class Costs:
    """Seconds of a step."""

    base_s: float = 2.5e-3
    decode_s: float = 2.5e-4
    prefill_s: float = 3e-4  # per token

    def of(self, plan: StepPlan) -> float:
        prefill = plan.num_tokens - plan.num_decodes
        return self.base_s + plan.num_decodes * self.decode_s + prefill * self.prefill_s


@dataclass(frozen=True)
class Arrival:
    at_s: float
    prompt: int  # tokens
    answer: int


@dataclass
class Answer:
    arrival: Arrival
    times_s: list[float] = field(default_factory=list)  # of each token

    def attains(self, ttft_s: float, itl_s: float) -> bool:
        gaps_s = self.times_s[-1] - self.times_s[0]
        mean_s = gaps_s / max(1, len(self.times_s) - 1)
        return self.times_s[0] - self.arrival.at_s <= ttft_s and mean_s <= itl_s


@dataclass
class Run:
    answers: list[Answer]
    dials: list[tuple[float, int, int]]  # (when, worker, dial)

    def attained(self, ttft_s: float, itl_s: float) -> float:
        return sum(each.attains(ttft_s, itl_s) for each in self.answers) / len(self.answers)


def wave(
    phases: Sequence[tuple[float, float, int, int]], periods: int = 1, seed: int = 1
) -> list[Arrival]:
    """Poisson arrivals; a phase is (seconds, requests per second, prompt tokens, answer tokens)."""
    rng, start_s, arrivals = Random(seed), 0.0, []
    for _ in range(periods):
        for length_s, rate, prompt, answer in phases:
            at_s = start_s
            while (at_s := at_s + rng.expovariate(rate)) < start_s + length_s:
                arrivals.append(Arrival(at_s, prompt, answer))
            start_s += length_s
    return arrivals


class Timed:
    """Workers are numbered 0.. in the order of `dials`, all of one pool."""

    def __init__(
        self,
        dials: Sequence[int],
        costs: Costs,
        options: SchedulerOptions,
        batch: BatchOptions,
    ) -> None:
        self.now = 0.0
        self._costs = costs
        self._events: list[tuple[float, int, object]] = []
        self._count = 0
        cache = CacheOptions(num_blocks=BLOCKS, enable_prefix_caching=False)
        self._scheduler = Scheduler(EPOCH, options, cache)
        self._batchers = [
            Batcher(
                number,
                1,
                batch,
                block_size=SIZE,
                eos_token_ids=frozenset(),
                max_model_len=4096,
            )
            for number in range(len(dials))
        ]
        self._busy = [False] * len(dials)
        self.num_moved = 0  # attempts that were taken back
        self._requests: dict[str, Request] = {}
        self._answers: dict[str, Answer] = {}
        self._open = 0
        self.dials: list[tuple[float, int, int]] = []
        self._decide(ApiUp(0, 1), *[WorkerUp(n, 1, 0, dial) for n, dial in enumerate(dials)])
        self._decide(PoolUp(0, BLOCKS, SIZE))

    def play(
        self, arrivals: Sequence[Arrival], turns: Sequence[tuple[float, int, int]] = ()
    ) -> Run:
        """`turns`: (when, worker, dial) of moves that nobody decided."""
        for number, arrival in enumerate(arrivals):
            self._at(arrival.at_s, (f"0-{number}-t", arrival))
        for at_s, number, dial in turns:
            self._at(at_s, (number, dial))
        self._at(TICK_S, None)
        self._open = len(arrivals)
        while self._open:
            self.now, _, event = heappop(self._events)
            self._happen(event)
        return Run(list(self._answers.values()), self.dials)

    # ---- inside

    def _at(self, at_s: float, event: object) -> None:
        self._count += 1
        heappush(self._events, (at_s, self._count, event))

    def _happen(self, event: object) -> None:
        if event is None:
            self._decide()
            self._at(self.now + TICK_S, None)
        elif isinstance(event, Send):
            self._deliver(event)
        elif isinstance(event, tuple) and isinstance(event[1], Arrival):
            self._arrive(*event)
        elif isinstance(event, tuple) and isinstance(event[1], int):
            worker = self._scheduler._members.workers[event[0]]
            self._scheduler._steering._apply([Move(worker, event[1])])
            self._decide()
        else:
            assert isinstance(event, tuple)
            self._end_step(*event)

    def _arrive(self, name: str, arrival: Arrival) -> None:
        self._answers[name] = Answer(arrival)
        prompt = pack_ids([len(self._answers) % 1000] * arrival.prompt)
        params = SamplingParams(max_tokens=arrival.answer, ignore_eos=True, seed=0)
        self._requests[name] = Request(name, prompt, params, len(self._answers), 0, ROOT)
        self._submit(name, 0)

    def _submit(self, name: str, attempt: int) -> None:
        request, emitted = self._requests[name], pack_ids([TOKEN] * self._num_seen(name))
        hashes = extend_chain(ROOT, request.prompt_ids + emitted, SIZE)
        states = [ChoiceState(0, attempt, emitted, hashes, False)]
        self._decide(Submit(0, 1, EPOCH, request, states, attempt > 0))

    def _num_seen(self, name: str) -> int:
        return len(self._answers[name].times_s)

    def _decide(self, *inputs: object) -> None:
        for command in self._scheduler.step(inputs, self.now):  # type: ignore[arg-type]
            if isinstance(command, ReadPool):
                self._decide(PoolRead(command.pool, [0] * BLOCKS, []))
            elif isinstance(command, Send):
                if isinstance(command.message, SetDial):
                    self.dials.append((self.now, command.to.number, command.message.dial))
                self._at(self.now + HOP_S, command)

    def _deliver(self, send: Send) -> None:
        if send.to.kind == "worker":
            self._batchers[send.to.number].handle(send.message)  # type: ignore[arg-type]
            self._turn(send.to.number)
        elif send.to.kind == "scheduler":
            self._decide(send.message)
        elif isinstance(send.message, TokenBatch):
            self._read(send.message)
        elif isinstance(send.message, Lost):
            self.num_moved += 1
            self._submit(send.message.ref.request, send.message.ref.attempt + 1)

    def _read(self, batch: TokenBatch) -> None:
        for tokens in batch.items:
            answer = self._answers[tokens.ref.request]
            new = tokens.first_index + len(tokens.ids) - len(answer.times_s)
            answer.times_s += [self.now] * new
            if tokens.finish is not None:
                self._open -= 1
                self._at(self.now + HOP_S, Send(_SCHEDULER, Closed(0, EPOCH, tokens.ref.request)))

    def _turn(self, number: int) -> None:
        if self._busy[number]:
            return
        batcher = self._batchers[number]
        plan = batcher.plan()
        self._send(number)
        if not plan.empty:
            self._busy[number] = True
            self._at(self.now + self._costs.of(plan), (number, plan))

    def _end_step(self, number: int, plan: StepPlan) -> None:
        samples = [Sample(TOKEN) if row.sample else None for row in plan.rows]
        batcher = self._batchers[number]
        batcher.commit(plan, StepResult(samples, compute_s=self._costs.of(plan)))
        self._busy[number] = False
        for command in batcher.take_seals():
            self._post(command)
        self._send(number)
        self._turn(number)

    def _send(self, number: int) -> None:
        for command in self._batchers[number].take():
            self._post(command)

    def _post(self, command: object) -> None:
        if isinstance(command, Send):
            self._at(self.now + HOP_S, command)
