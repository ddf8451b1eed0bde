"""A hand-driven scheduler for tests: builds messages, keeps what was sent, answers like a worker.

Owns one `Scheduler` and the assignments each fake worker holds. Invariant: after every step the
scheduler's integrity holds.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from diptych.engine.core.config import CacheOptions, SchedulerOptions
from diptych.engine.core.hashing import extend_chain
from diptych.engine.core.messages import (
    Abort,
    Address,
    ApiUp,
    Assign,
    ChoiceState,
    Closed,
    CommittedBlock,
    Grants,
    Join,
    Joined,
    Message,
    PoolUp,
    Progress,
    Revoke,
    Send,
    Submit,
    WorkerDown,
    WorkerUp,
)
from diptych.engine.core.params import SamplingParams
from diptych.engine.core.request import Request, SeqRef
from diptych.engine.core.types import BlockId, DownCause, Generation, Role, pack_ids
from diptych.scheduler.commands import PageEntry, PoolRead, ReadPool, SchedulerInput
from diptych.scheduler.lifecycle import RowState
from diptych.scheduler.scheduler import Scheduler

ROOT = b"r" * 32
EPOCH = 7
SIZE = 16  # tokens of a block


@dataclass
class Held:
    """An assignment at a fake worker."""

    assign: Assign
    table: list[BlockId]
    generations: list[Generation]
    committed: int  # blocks


def make_request(
    name: str,
    prompt: Seq[int],
    *,
    max_tokens: int = 16,
    n: int = 1,
    rank: int = 0,
    priority: int = 0,
) -> Request:
    params = SamplingParams(n=n, max_tokens=max_tokens, seed=0)
    return Request(name, pack_ids(prompt), params, rank, priority, ROOT)


class World:
    """Workers are numbered 0.. in the order of `dials`, all of one pool."""

    def __init__(
        self,
        dials: Seq[int] = (100, 0),
        *,
        num_blocks: int = 64,
        options: SchedulerOptions | None = None,
        caching: bool = True,
        up: bool = True,
    ) -> None:
        self.options = options or SchedulerOptions()
        cache = CacheOptions(num_blocks=num_blocks, enable_prefix_caching=caching)
        self.scheduler = Scheduler(EPOCH, self.options, cache)
        self.num_blocks = num_blocks
        self.now = 0.0
        self.epochs: dict[int, int] = {}
        self.held: dict[int, dict[SeqRef, Held]] = {}
        self.sent: list[Send] = []  # what the last step sent
        self.to_api: list[Message] = []  # since start
        self.reads: list[int] = []
        self.auto_read = True
        if up:
            self.step(ApiUp(0, 1))
            for worker, dial in enumerate(dials):
                self.worker_up(worker, dial)
            self.step(PoolUp(0, num_blocks, SIZE))

    # ---- driving -------------------------------------------------------------------------------

    def step(self, *inputs: SchedulerInput, dt: float = 0.0) -> list[Send]:
        self.now += dt
        commands = self.scheduler.step(inputs, self.now)
        self.scheduler.check_integrity()
        self.sent = [command for command in commands if isinstance(command, Send)]
        for send in self.sent:
            self._deliver(send.to, send.message)
        sent = self.sent
        for command in commands:
            if isinstance(command, ReadPool):
                self.reads.append(command.pool)
                if self.auto_read:
                    sent = sent + self.step(PoolRead(command.pool, [0] * self.num_blocks, []))
        self.sent = sent
        return sent

    def worker_up(self, worker: int, dial: int, join: bool = True) -> list[Send]:
        epoch = self.epochs[worker] = self.epochs.get(worker, 0) + 1
        self.held[worker] = {}
        sent = self.step(WorkerUp(worker, epoch, 0, dial))
        return sent + self.joined(worker) if join else sent

    def joined(self, worker: int) -> list[Send]:
        return self.step(Joined(EPOCH, worker, self.epochs[worker]))

    def down(self, worker: int, cause: DownCause = DownCause.KILLED) -> list[Send]:
        self.held[worker] = {}
        return self.step(WorkerDown(worker, self.epochs[worker], cause))

    def submit(
        self,
        request: Request,
        *,
        attempt: int = 0,
        emitted: Seq[int] = (),
        choices: Seq[int] = (0,),
        recovering: bool = False,
        api: int = 0,
        api_epoch: int = 1,
        want_prompt_logprobs: bool = False,
    ) -> list[Send]:
        packed = pack_ids(emitted)
        hashes = extend_chain(request.root, request.prompt_ids + packed, SIZE)
        states = [ChoiceState(c, attempt, packed, hashes, want_prompt_logprobs) for c in choices]
        return self.step(Submit(api, api_epoch, EPOCH, request, states, recovering))

    def abort(self, request: str, choice: int = 0) -> list[Send]:
        return self.step(Abort(0, EPOCH, request, choice))

    def close(self, request: str) -> list[Send]:
        return self.step(Closed(0, EPOCH, request))

    def tick(self, dt: float = 0.25) -> list[Send]:
        return self.step(dt=dt)

    # ---- a worker's answers --------------------------------------------------------------------

    def progress(
        self,
        worker: int,
        *,
        steps: int = 1,
        compute_s: float = 0.005,
        prefill_tokens: int = 0,
        committed: Seq[CommittedBlock] = (),
        sealed: Seq[SeqRef] = (),
        finished: Seq[SeqRef] = (),
        released: Seq[SeqRef] = (),
        starved: Seq[SeqRef] = (),
    ) -> list[Send]:
        for ref in (*sealed, *finished, *released):
            self.held[worker].pop(ref, None)
        return self.step(
            Progress(
                EPOCH,
                worker,
                self.epochs[worker],
                steps,
                compute_s,
                prefill_tokens,
                0,
                list(committed),
                list(sealed),
                list(finished),
                list(released),
                list(starved),
            )
        )

    def full(self, worker: int, ref: SeqRef, upto: int, salt: int = 0) -> list[CommittedBlock]:
        """The next blocks of the sequence as full ones, up to table index `upto`."""
        held = self.held[worker][ref]
        names = list(held.assign.hashes)
        while len(names) < upto:  # of decoded tokens: any name will do, but a unique one
            names.append(f"{ref.request}/{ref.choice}/{salt}/{len(names)}".encode().ljust(32))
        blocks = []
        for index in range(held.committed, upto):
            parent = names[index - 1] if index else held.assign.request.root
            block, generation = held.table[index], held.generations[index]
            blocks.append(CommittedBlock(ref, index, block, generation, names[index], parent))
        held.committed = max(held.committed, upto)
        return blocks

    def prefill_done(self, worker: int, ref: SeqRef) -> list[Send]:
        """Commits all full blocks and, on a prefill side, seals."""
        held = self.held[worker][ref]
        tokens = held.assign.request.num_prompt + len(held.assign.emitted) // 4
        blocks = self.full(worker, ref, tokens // SIZE)
        sealed = [ref] if held.assign.role is Role.PREFILL else []
        uncached = tokens - held.assign.num_computed
        return self.progress(worker, prefill_tokens=uncached, committed=blocks, sealed=sealed)

    # ---- looking -------------------------------------------------------------------------------

    def assigns(self) -> list[tuple[int, Assign]]:
        """What the last step assigned: (worker, message)."""
        return [(s.to.number, s.message) for s in self.sent if isinstance(s.message, Assign)]

    def of(self, kind: type[Message]) -> list[Message]:
        """Messages of this kind in the last step."""
        return [send.message for send in self.sent if isinstance(send.message, kind)]

    def revoked(self) -> list[int]:
        """Workers that the last step told to give something back."""
        return [send.to.number for send in self.sent if isinstance(send.message, Revoke)]

    def heard(self, kind: type[Message]) -> list[Message]:
        """Messages of this kind that the API servers got since start."""
        return [message for message in self.to_api if isinstance(message, kind)]

    def state(self, request: str, choice: int = 0) -> RowState | None:
        rows = {row.key: row.state for row in self.scheduler.audit().rows}
        return rows.get((request, choice))

    def at_rest(self) -> None:
        """Nothing is left over: no row, no used block."""
        audit = self.scheduler.audit()
        assert not audit.rows
        assert audit.waiting == audit.waiting_tokens == 0
        for pool in audit.pools.values():
            assert pool.private == pool.shared == pool.hungry == pool.draining == 0

    def _deliver(self, to: Address, message: Message) -> None:
        if to.kind == "api":
            self.to_api.append(message)
            return
        assert to.kind == "worker"
        if self.epochs.get(to.number) != to.epoch:
            return
        assert not isinstance(message, Join) or message.worker_epoch == to.epoch
        held = self.held[to.number]
        if isinstance(message, Assign):
            held[message.ref] = Held(
                message,
                list(message.block_table),
                list(message.generations),
                message.num_computed // SIZE,
            )
        elif isinstance(message, Grants):
            for grant in message.grants:
                if (mine := held.get(grant.ref)) is not None:
                    assert grant.first == len(mine.table)
                    mine.table += grant.blocks
                    mine.generations += grant.generations


def page_entries(ids: Seq[int], blocks: Seq[BlockId]) -> list[PageEntry]:
    """Valid control page entries for the full blocks of `ids`."""
    parent, entries = ROOT, []
    for block, name in zip(blocks, extend_chain(ROOT, pack_ids(ids), SIZE)):
        entries.append(PageEntry(block, name, parent))
        parent = name
    return entries
