"""The log of requests: scenarios one by one, then random losses against a list per choice."""

import random
from collections.abc import Callable

import pytest

from diptych.engine.core.errors import (
    InvalidRequestError,
    OverloadedError,
    PoisonRequestError,
    RequestTimeoutError,
)
from diptych.engine.core.hashing import extend_chain, hash_root
from diptych.engine.core.messages import (
    Abort,
    Accepted,
    Address,
    Closed,
    Failed,
    Lost,
    Message,
    Placed,
    Rejected,
    SchedulerDown,
    SchedulerUp,
    Send,
    Stats,
    Submit,
    TokenBatch,
    Tokens,
)
from diptych.engine.core.params import SamplingParams
from diptych.engine.core.plan import FinishInfo, TokenLogprobs
from diptych.engine.core.request import Request, SeqRef
from diptych.engine.core.types import FinishReason, LossCause, pack_ids, unpack_ids
from diptych.scheduler.commands import Delivered, Ended, JournalCommand, Refused
from diptych.scheduler.journal import Journal

ROOT = hash_root("test")
STOP = FinishInfo(FinishReason.STOP)
PROMPT = list(range(40))


def request_of(name: str, n: int = 1, *, prompt_logprobs: int | None = None) -> Request:
    params = SamplingParams(n=n, max_tokens=100, prompt_logprobs=prompt_logprobs)
    return Request(name, pack_ids(PROMPT), params, rank=0, root=ROOT)


def journal_up(**options: int) -> Journal:
    journal = Journal(3, 9, block_size=16, **options)
    journal.handle(SchedulerUp(1), 0.0)
    return journal


def drain(journal: Journal) -> list[JournalCommand]:
    commands = journal.take()
    journal.check_integrity()
    return commands


def sent(commands: list[JournalCommand]) -> list[Message]:
    messages = [command.message for command in commands if isinstance(command, Send)]
    for command in commands:
        assert not isinstance(command, Send) or command.to.kind == "scheduler"
    return messages


def submits(commands: list[JournalCommand]) -> list[Submit]:
    return [message for message in sent(commands) if isinstance(message, Submit)]


def tokens_of(
    name: str,
    first: int,
    ids: list[int],
    *,
    attempt: int = 0,
    choice: int = 0,
    finish: FinishInfo | None = None,
    epoch: int = 1,
    prompt_logprobs: list[TokenLogprobs] | None = None,
    logprobs: list[TokenLogprobs] | None = None,
) -> TokenBatch:
    ref = SeqRef(name, choice, attempt)
    item = Tokens(ref, first, ids, logprobs, finish, 0, prompt_logprobs)
    return TokenBatch(epoch, 0, 0, [item])


def delivered(commands: list[JournalCommand]) -> list[int]:
    return [
        token
        for command in commands
        if isinstance(command, Delivered)
        for token in command.tokens.ids
    ]


def test_open_submits_prompt_and_hashes() -> None:
    journal = journal_up()
    journal.open(request_of("a", n=2), 0.0)
    [submit] = submits(drain(journal))
    assert (submit.api, submit.api_epoch, submit.scheduler_epoch) == (3, 9, 1)
    assert [(c.choice, c.attempt, c.emitted) for c in submit.choices] == [(0, 0, b""), (1, 0, b"")]
    assert submit.choices[0].hashes == extend_chain(ROOT, pack_ids(PROMPT), 16)
    assert not submit.recovering


def test_tokens_pass_once_overlaps_are_dropped() -> None:
    journal = journal_up()
    journal.open(request_of("a"), 0.0)
    drain(journal)
    entries = [TokenLogprobs(i, -1.0, 1, []) for i in (5, 6, 7)]
    journal.handle(tokens_of("a", 0, [5], logprobs=entries[:1]), 0.0)
    journal.handle(tokens_of("a", 0, [5], logprobs=entries[:1]), 0.0)
    journal.handle(tokens_of("a", 0, [5, 6, 7], logprobs=entries, finish=STOP), 0.0)
    commands = drain(journal)
    assert delivered(commands) == [5, 6, 7]
    last = [command for command in commands if isinstance(command, Delivered)][-1].tokens
    assert (last.first_index, last.logprobs, last.finish) == (1, entries[1:], STOP)
    assert commands[-1] == Ended("a")
    assert sent(commands) == [Closed(3, 1, "a")]
    assert journal.num_open == 0


def test_a_gap_is_submitted_again_at_once() -> None:
    journal = journal_up()
    journal.open(request_of("a"), 0.0)
    journal.handle(Accepted(1, "a"), 0.0)
    journal.handle(tokens_of("a", 0, list(range(100, 130))), 0.0)
    drain(journal)
    journal.handle(tokens_of("a", 31, [9]), 0.0)
    journal.handle(tokens_of("a", 30, [9]), 0.0)  # of the attempt that is given up
    commands = drain(journal)
    assert delivered(commands) == []
    [submit] = submits(commands)
    assert submit.recovering
    [choice] = submit.choices
    assert (choice.attempt, unpack_ids(choice.emitted)) == (1, list(range(100, 130)))
    whole = pack_ids(PROMPT + list(range(100, 130)))
    assert choice.hashes == extend_chain(ROOT, whole, 16)


def test_a_loss_continues_one_choice_only() -> None:
    journal = journal_up()
    journal.open(request_of("a", n=2), 0.0)
    journal.handle(Accepted(1, "a"), 0.0)
    journal.handle(tokens_of("a", 0, [1], choice=1), 0.0)
    drain(journal)
    lost = Lost(1, SeqRef("a", 1, 0), LossCause.WORKER)
    journal.handle(lost, 0.0)
    journal.handle(lost, 0.0)  # twice is once
    [submit] = submits(drain(journal))
    assert [(c.choice, c.attempt) for c in submit.choices] == [(1, 1)]
    journal.handle(tokens_of("a", 0, [7], choice=0, finish=STOP), 0.0)
    journal.handle(tokens_of("a", 1, [2], choice=1, attempt=1, finish=STOP), 0.0)
    commands = drain(journal)
    assert delivered(commands) == [7, 2]
    assert commands[-1] == Ended("a")


def test_refusals_before_acceptance() -> None:
    for retry_after_s, error in ((None, InvalidRequestError), (2.5, OverloadedError)):
        journal = journal_up()
        journal.open(request_of("a"), 0.0)
        drain(journal)
        journal.handle(Rejected(1, "a", "no room", retry_after_s), 0.0)
        commands = drain(journal)
        [refused] = [command for command in commands if isinstance(command, Refused)]
        assert type(refused.error) is error
        assert refused.error.message == "no room"
        assert sent(commands) == [Closed(3, 1, "a")]
        assert journal.num_open == 0


def test_an_accepted_request_is_never_refused_but_tried_again() -> None:
    journal = journal_up()
    journal.open(request_of("a"), 0.0)
    journal.handle(Accepted(1, "a"), 0.0)
    drain(journal)
    journal.handle(Rejected(1, "a", "no room", 2.0), 10.0)
    journal.tick(11.9)
    assert drain(journal) == []
    journal.tick(12.0)
    [submit] = submits(drain(journal))
    assert submit.recovering
    assert submit.choices[0].attempt == 1
    journal.tick(99.0)
    assert drain(journal) == []


def test_a_failed_choice_ends_the_request() -> None:
    journal = journal_up()
    journal.open(request_of("a", n=2), 0.0)
    drain(journal)
    journal.handle(Failed(1, SeqRef("a", 1, 5), "old"), 0.0)
    assert drain(journal) == []
    journal.handle(Failed(1, SeqRef("a", 1, 0), "it crashed a worker"), 0.0)
    [refused] = [command for command in drain(journal) if isinstance(command, Refused)]
    assert type(refused.error) is PoisonRequestError


def test_stop_aborts_one_choice_and_ends_with_the_last() -> None:
    journal = journal_up()
    journal.open(request_of("a", n=2), 0.0)
    drain(journal)
    journal.stop("a", 0)
    journal.stop("a", 0)
    assert drain(journal) == [drain_send(Abort(3, 1, "a", 0))]
    journal.handle(tokens_of("a", 0, [4]), 0.0)
    assert drain(journal) == []
    journal.stop("a", 1)
    commands = drain(journal)
    assert sent(commands) == [Abort(3, 1, "a", 1), Closed(3, 1, "a")]
    assert commands[-1] == Ended("a")
    journal.stop("a", 1)
    journal.close("a")
    assert drain(journal) == []


def drain_send(message: Message) -> Send:
    return Send(Address("scheduler", 0, 1), message)


def test_close_says_closed_and_nothing_more() -> None:
    journal = journal_up()
    journal.open(request_of("a"), 0.0)
    drain(journal)
    journal.close("a")
    assert drain(journal) == [drain_send(Closed(3, 1, "a"))]
    journal.handle(tokens_of("a", 0, [4]), 0.0)
    journal.handle(Accepted(1, "a"), 0.0)
    assert drain(journal) == []


def test_deadline() -> None:
    journal = journal_up()
    journal.open(request_of("a"), 5.0, timeout_s=2.0)
    journal.open(request_of("b"), 5.0)
    drain(journal)
    journal.tick(6.9)
    assert drain(journal) == []
    journal.tick(7.0)
    commands = drain(journal)
    [refused] = [command for command in commands if isinstance(command, Refused)]
    assert type(refused.error) is RequestTimeoutError
    assert refused.error.status == 408
    assert sent(commands) == [Closed(3, 1, "a")]
    assert journal.num_open == 1


def test_the_log_has_a_cap() -> None:
    journal = journal_up(max_open=1)
    journal.open(request_of("a"), 0.0)
    with pytest.raises(OverloadedError):
        journal.open(request_of("b"), 0.0)
    journal.close("a")
    journal.open(request_of("b"), 0.0)
    drain(journal)


def test_recovery_goes_oldest_first_in_windows() -> None:
    journal = journal_up(window=2)
    for name in "abcd":
        journal.open(request_of(name), 0.0)
    for name in "abc":
        journal.handle(Accepted(1, name), 0.0)
    journal.handle(tokens_of("b", 0, [1, 2]), 0.0)
    drain(journal)
    journal.handle(SchedulerDown(1), 0.0)
    journal.open(request_of("e"), 0.0)
    assert drain(journal) == []
    journal.handle(tokens_of("a", 0, [8]), 0.0)  # a worker's last step under the old scheduler
    assert delivered(drain(journal)) == [8]
    journal.handle(SchedulerUp(2), 0.0)
    journal.open(request_of("f"), 0.0)
    first = submits(drain(journal))
    assert [(s.request.id, s.recovering) for s in first] == [("a", True), ("b", True)]
    assert unpack_ids(first[1].choices[0].emitted) == [1, 2]
    assert first[1].choices[0].attempt == 1
    journal.handle(tokens_of("a", 1, [9]), 0.0)  # old epoch
    journal.handle(tokens_of("a", 1, [9], epoch=2), 0.0)  # old attempt
    journal.handle(Accepted(1, "a"), 0.0)  # old epoch
    assert drain(journal) == []
    journal.handle(Accepted(2, "a"), 0.0)
    assert [s.request.id for s in submits(drain(journal))] == ["c"]
    journal.close("b")  # frees its place in the window
    assert [(s.request.id, s.recovering) for s in submits(drain(journal))] == [("d", False)]
    journal.handle(Rejected(2, "d", "full", 1.0), 0.0)
    assert [s.request.id for s in submits(drain(journal))] == ["e"]
    journal.handle(Accepted(2, "c"), 0.0)
    assert [s.request.id for s in submits(drain(journal))] == ["f"]
    journal.handle(SchedulerUp(2), 0.0)
    journal.handle(SchedulerUp(1), 0.0)
    journal.handle(SchedulerDown(1), 0.0)
    assert drain(journal) == []
    journal.open(request_of("g"), 0.0)
    assert [s.request.id for s in submits(drain(journal))] == ["g"]


def test_prompt_logprobs_pass_once() -> None:
    journal = journal_up()
    journal.open(request_of("a", n=2, prompt_logprobs=0), 0.0)
    [submit] = submits(drain(journal))
    assert [choice.want_prompt_logprobs for choice in submit.choices] == [True, False]
    entries = [TokenLogprobs(1, -1.0, 1, [])]
    journal.handle(tokens_of("a", 0, [3], prompt_logprobs=entries), 0.0)
    journal.handle(tokens_of("a", 0, [3, 4], prompt_logprobs=entries), 0.0)
    items = [command.tokens for command in drain(journal) if isinstance(command, Delivered)]
    assert [item.prompt_logprobs for item in items] == [entries, None]
    journal.handle(Lost(1, SeqRef("a", 0, 0), LossCause.PREEMPTED), 0.0)
    [submit] = submits(drain(journal))
    assert not submit.choices[0].want_prompt_logprobs


def test_stats_are_kept() -> None:
    journal = journal_up()
    stats = Stats(1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, [], True)
    journal.handle(stats, 0.0)
    assert journal.stats is stats
    journal.handle(SchedulerDown(1), 0.0)
    assert journal.stats is None


class World:
    """A scheduler and workers that lose, repeat, skip and die at random, and the clients."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.journal = Journal(3, 9, block_size=16, window=3)
        self.epoch = 0
        self.up = False
        self.running: dict[tuple[str, int], tuple[int, int]] = {}  # -> (attempt, tokens emitted)
        self.old: list[TokenBatch] = []
        self.answers: dict[tuple[str, int], list[int]] = {}
        self.ended: dict[str, str] = {}
        self.accepted: set[str] = set()
        self.lengths: dict[str, int] = {}
        self.later: list[Accepted | Rejected] = []  # the scheduler's answers under way
        self.handle(SchedulerUp(0))
        self.up = True

    def handle(self, message: object) -> None:
        self.journal.handle(message, 0.0)  # type: ignore[arg-type]  # by construction
        self.carry_out()

    def carry_out(self) -> None:
        for command in drain(self.journal):
            if isinstance(command, Delivered):
                self.deliver(command)
            elif isinstance(command, Ended):
                assert command.request not in self.ended
                self.ended[command.request] = "ended"
            elif isinstance(command, Refused):
                assert command.request not in self.accepted, "accepted requests are never refused"
                self.ended[command.request] = "refused"
            elif self.up and command.to.epoch == self.epoch:
                self.receive(command.message)

    def deliver(self, command: Delivered) -> None:
        tokens = command.tokens
        answer = self.answers.setdefault((command.request, tokens.ref.choice), [])
        assert tokens.first_index == len(answer)
        answer += tokens.ids

    def receive(self, message: Message) -> None:
        if isinstance(message, Closed):
            for key in [key for key in self.running if key[0] == message.request]:
                del self.running[key]
        elif isinstance(message, Submit):
            name = message.request.id
            assert message.recovering or name not in self.accepted
            if not message.recovering and self.rng.random() < 0.1:
                self.later.append(Rejected(self.epoch, name, "full", 1.0))
                return
            for choice in message.choices:
                emitted = unpack_ids(choice.emitted)
                assert emitted == token_list(name, choice.choice, len(emitted))
                self.running[name, choice.choice] = (choice.attempt, len(emitted))
            self.later.append(Accepted(self.epoch, name))

    def compute(self) -> None:
        """One running choice emits; sometimes repeated, skipped or held back."""
        rng = self.rng
        if not self.running:
            return
        key = rng.choice(list(self.running))
        attempt, count = self.running[key]
        back = rng.randrange(min(count, 3) + 1)
        more = min(count + rng.randrange(1, 4), self.lengths[key[0]])
        ids = token_list(*key, more)[count - back :]
        finish = STOP if more == self.lengths[key[0]] else None
        self.running[key] = (attempt, more)
        if finish is not None:
            del self.running[key]
        ref = SeqRef(key[0], key[1], attempt)
        item = Tokens(ref, count - back, ids, None, finish, 0, None)
        batch = TokenBatch(self.epoch, 0, 0, [item])
        self.old.append(batch)
        if finish is None and rng.random() < 0.05:
            return  # this message is lost: the next one shows a gap
        self.handle(batch)


def token_list(name: str, choice: int, count: int) -> list[int]:
    return [hash((int(name), choice, i)) % 1000 for i in range(count)]


def lose(world: World) -> None:
    if world.running:
        name, choice = world.rng.choice(list(world.running))
        attempt, _ = world.running.pop((name, choice))
        world.handle(Lost(world.epoch, SeqRef(name, choice, attempt), LossCause.WORKER))


def answer_one(world: World) -> None:
    if world.later:
        message = world.later.pop(world.rng.randrange(len(world.later)))
        if message.scheduler_epoch == world.epoch and isinstance(message, Accepted):
            world.accepted.add(message.request)
        world.handle(message)


def restart(world: World) -> None:
    world.up = False
    world.running.clear()
    if world.rng.random() < 0.5:
        world.handle(SchedulerDown(world.epoch))
    world.epoch += 1
    world.up = True
    world.handle(SchedulerUp(world.epoch))


def repeat_old(world: World) -> None:
    if world.old:
        world.handle(world.rng.choice(world.old))


@pytest.mark.parametrize("seed", range(30))
def test_random_losses_never_show(seed: int) -> None:
    world = World(seed)
    rng = world.rng
    for number in range(400):
        if number % 10 == 0:
            name, n = str(number), rng.randrange(1, 4)
            world.lengths[name] = rng.randrange(1, 40)
            for choice in range(n):
                world.answers[name, choice] = []
            world.journal.open(request_of(name, n), 0.0)
            world.carry_out()
        moves: list[Callable[[World], None]] = [World.compute] * 8
        moves += [answer_one] * 4 + [repeat_old, lose]
        move = rng.choice(moves) if rng.random() > 0.02 else restart
        move(world)
    for _ in range(100_000):
        if not world.journal.num_open:
            break
        answer_one(world)
        world.compute()
        if not world.running and not world.later:
            restart(world)  # a lost last message leaves nothing that would show the gap
    assert world.journal.num_open == 0, f"seed {seed}"
    assert set(world.ended) == set(world.lengths), f"seed {seed}"
    for (name, choice), answer in world.answers.items():
        if world.ended[name] == "ended":
            assert answer == token_list(name, choice, world.lengths[name]), f"seed {seed}"


def test_the_wait_ends_at_the_first_placement_and_preemptions_are_counted() -> None:
    journal = journal_up()
    journal.open(request_of("r"), 10.0)
    drain(journal)
    first = SeqRef("r", 0, 0)
    journal.handle(TokenBatch(1, 0, 1, [Tokens(first, 0, [7], None, None, 0, None)]), 10.5)
    journal.handle(Placed(1, first), 11.0)  # overtaken by the first token
    journal.handle(Lost(1, first, LossCause.PREEMPTED), 12.0)
    again = SeqRef("r", 0, 1)
    journal.handle(Placed(1, again), 15.0)
    journal.handle(Placed(1, first), 16.0)
    journal.handle(TokenBatch(1, 0, 1, [Tokens(again, 1, [8], None, STOP, 0, None)]), 17.0)
    told = [c for c in drain(journal) if isinstance(c, Delivered)]
    assert [(c.queued_s, c.preemptions) for c in told] == [(None, 0), (1.0, 1)]
