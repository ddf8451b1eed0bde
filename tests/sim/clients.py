"""The clients: what each one asked, has seen, and must see.

Owns the truth about outcomes. Invariants: each token index reaches a client once, in order, and
equals the oracle; an accepted request ends exactly once, within its deadline, and only a poison
request fails.
"""

from dataclasses import dataclass, field
from typing import Final

from diptych.engine.core.errors import (
    DiptychError,
    InvalidRequestError,
    OverloadedError,
    PoisonRequestError,
    RequestTimeoutError,
)
from diptych.engine.core.hashing import hash_root
from diptych.engine.core.messages import ChoiceState, Tokens
from diptych.engine.core.params import SamplingParams
from diptych.engine.core.request import Request
from diptych.engine.core.types import FinishReason, blocks_for, pack_ids, unpack_ids
from tests.sim.model import Answer, Oracle, RequestSpec
from tests.sim.scenario import Scenario
from tests.sim.world import check

DEADLINE_SLACK_S: Final = 0.2


def make_request(spec: RequestSpec, now: float) -> Request:
    params = SamplingParams(
        n=spec.n,
        seed=spec.seed,
        max_tokens=spec.max_tokens,
        min_tokens=spec.min_tokens,
        ignore_eos=spec.ignore_eos,
        stop_token_ids=spec.stop_ids,
        logprobs=0 if spec.logprobs else None,
        prompt_logprobs=0 if spec.prompt_logprobs else None,
    )
    return Request(
        id=f"{spec.api}-{spec.index}-x",
        prompt_ids=pack_ids(spec.prompt),
        params=params,
        rank=int(now * 1e9) * 1000 + spec.index,
        priority=spec.priority,
        root=hash_root("sim", bytes([spec.salt]) if spec.salt else b""),
    )


@dataclass(slots=True)
class Client:
    """One request as its client sees it. `over`: how it ended, None while it is open."""

    spec: RequestSpec
    request: Request
    opened: float
    answers: list[Answer]
    seen: list[list[int]]
    fits: bool  # it is not impossible from the start
    lossy: bool  # single batches of tokens may be lost
    attempts: dict[int, int] = field(default_factory=dict)  # choice -> the newest submitted
    submitted_to: int = 0  # scheduler epoch
    causes: dict[int, int] = field(default_factory=dict)  # choice -> reasons for an attempt
    faults: int = 0  # workers that it crashed
    accepted: bool = False
    finished: set[int] = field(default_factory=set)
    stopped: set[int] = field(default_factory=set)
    over: str | None = None

    @property
    def num_seen(self) -> int:
        return sum(len(ids) for ids in self.seen)

    def end(self, how: str, now: float) -> None:
        check(self.over is None, "{} ends twice: {} after {}", self.request.id, how, self.over)
        self.over = how
        if self.spec.timeout_s is not None:
            latest = self.opened + self.spec.timeout_s + DEADLINE_SLACK_S
            check(now <= latest, "{} ends at {}, after its deadline", self.request.id, now)

    def deliver(self, tokens: Tokens) -> None:
        """Checks one delivery against the oracle."""
        name, choice = self.request.id, tokens.ref.choice
        check(self.over is None, "{} gets tokens after its end ({})", name, self.over)
        check(choice not in self.finished, "{}/{} gets tokens after its finish", name, choice)
        check(
            tokens.ref.attempt == self.attempts[choice], "{}: an old attempt delivers", tokens.ref
        )
        check(choice not in self.stopped, "{}/{} gets tokens after its stop", name, choice)
        seen, answer = self.seen[choice], self.answers[choice]
        check(
            tokens.first_index == len(seen),
            "{}/{}: index {} where {} is due",
            name,
            choice,
            tokens.first_index,
            len(seen),
        )
        first = not seen
        seen.extend(tokens.ids)
        check(
            seen == answer.tokens[: len(seen)],
            "{}/{}: wrong token in {} at {}",
            name,
            choice,
            tokens.ids,
            tokens.first_index,
        )
        self.accepted = True
        self._logprobs(tokens, answer, first)
        if tokens.finish is not None:
            check(
                len(seen) == len(answer.tokens),
                "{}/{} finishes after {} of {}",
                name,
                choice,
                len(seen),
                len(answer.tokens),
            )
            same = tokens.finish.reason == answer.finish.reason
            if answer.finish.reason is not FinishReason.ERROR:
                same = same and tokens.finish.stop_reason == answer.finish.stop_reason
            check(
                same, "{}/{}: finish {} where {} is due", name, choice, tokens.finish, answer.finish
            )
            self.finished.add(choice)
        else:
            check(
                len(seen) < len(answer.tokens) or answer.finish.reason is FinishReason.ERROR,
                "{}/{} does not finish at its last token",
                name,
                choice,
            )

    def submit(self, states: list[ChoiceState], epoch: int) -> None:
        """The journal asks for the next attempt: it must start from what the client has seen."""
        self.submitted_to = epoch
        for state in states:
            choice, name = state.choice, self.request.id
            check(unpack_ids(state.emitted) == self.seen[choice], "{}: its log is wrong", name)
            last = self.attempts.get(choice, -1)
            check(state.attempt > last, "{}: attempt {} after {}", name, state.attempt, last)
            most = epoch + self.causes.get(choice, 0)
            check(self.lossy or state.attempt < most, "{}: attempt {} for nothing", name, most)
            self.attempts[choice] = state.attempt

    def _logprobs(self, tokens: Tokens, answer: Answer, first: bool) -> None:
        name = self.request.id
        if self.spec.logprobs and tokens.ids:
            start = tokens.first_index
            due = answer.logprobs[start : start + len(tokens.ids)]
            check(tokens.logprobs == due, "{}: wrong logprobs at {}", name, start)
        if self.spec.prompt_logprobs and first and tokens.ids and tokens.ref.choice == 0:
            check(
                tokens.prompt_logprobs == answer.prompt_logprobs,
                "{}: wrong prompt logprobs: {}",
                name,
                tokens.prompt_logprobs,
            )
        check(tokens.prompt_logprobs is None or first, "{}: prompt logprobs twice", name)

    def refuse(self, error: DiptychError, now: float) -> None:
        name = self.request.id
        if isinstance(error, OverloadedError):
            check(not self.accepted, "{} is refused after it was accepted: {}", name, error)
            check(error.retry_after_s > 0, "{}: retry after {}", name, error.retry_after_s)
        elif isinstance(error, RequestTimeoutError):
            timeout = self.spec.timeout_s
            check(timeout is not None, "{} times out without a deadline", name)
            check(timeout is None or now >= self.opened + timeout, "{} times out early", name)
        elif isinstance(error, PoisonRequestError):
            guilty = self.spec.poison_at is not None or not self.fits
            check(guilty, "{} fails although it is innocent", name)
        elif isinstance(error, InvalidRequestError):
            check(not self.accepted and not self.fits, "{} is refused: {}", name, error)
        else:
            check(False, "{} is refused with {!r}", name, error)
        self.end(type(error).__name__, now)

    def ended(self, now: float) -> None:
        due = set(range(self.spec.n))
        check(
            self.finished | self.stopped == due,
            "{} ends with choices {} of {}",
            self.request.id,
            sorted(self.finished | self.stopped),
            self.spec.n,
        )
        self.end("complete", now)


class Clients:
    """All clients of a run."""

    def __init__(self, oracle: Oracle, scenario: Scenario) -> None:
        self.oracle = oracle
        self._scenario = scenario
        self.by_id: dict[str, Client] = {}

    def open(self, spec: RequestSpec, now: float) -> Client:
        request = make_request(spec, now)
        answers = [self.oracle.answer(spec, choice) for choice in range(spec.n)]
        for answer in answers:
            self.oracle.register(request.root, answer, spec.prompt + answer.tokens)
        fits = self._fits(spec)
        seen: list[list[int]] = [[] for _ in range(spec.n)]
        # What a zombie repeats may have been lost before, and comes out of turn: a gap, as well.
        lossy = self._scenario.token_loss > 0 or self._scenario.zombies
        client = Client(spec, request, now, answers, seen, fits, lossy)
        self.by_id[request.id] = client
        return client

    def _fits(self, spec: RequestSpec) -> bool:
        """Whether it could be computed in an empty pool, and wait in an empty queue."""
        scenario, num_prompt = self._scenario, len(spec.prompt)
        options = scenario.scheduler
        return (
            blocks_for(num_prompt + spec.max_tokens - 1, scenario.block_size) <= scenario.num_blocks
            and spec.n <= options.max_waiting
            and spec.n * num_prompt <= options.max_waiting_tokens
        )

    @property
    def num_open(self) -> int:
        return sum(client.over is None for client in self.by_id.values())
