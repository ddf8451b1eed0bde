"""Rows that are on workers: their blocks, their growth, and how they are taken back.

Owns what happens between PLACE and DRAIN. Invariants: the blocks of an attempt are released when,
and only when, every worker that could touch them has let go or was fenced; a row that was preempted
as often as allowed gets all blocks it can ever need at once, so it never asks for more; as long as
a row lacks blocks, its pool takes no new rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from diptych.engine.core.config import CacheOptions, SchedulerOptions
from diptych.engine.core.messages import CommittedBlock, Grant, Landed, Placed
from diptych.engine.core.request import SeqRef
from diptych.engine.core.types import (
    STEP_SIZES,
    BlockHash,
    BlockId,
    LossCause,
    Role,
    blocks_for,
)
from diptych.scheduler.assigning import assignment
from diptych.scheduler.lifecycle import RowEvent, RowState
from diptych.scheduler.members import Members, Pool, Worker
from diptych.scheduler.outbox import Outbox
from diptych.scheduler.placement import Placement
from diptych.scheduler.rows import Row, RowTable, Source


@dataclass(slots=True)
class RunCounts:
    """Sums since start."""

    prefix_queries: int = 0  # tokens
    prefix_hits: int = 0  # tokens
    preemptions: int = 0
    prefill_tokens: int = 0
    placed: int = 0  # rows, every attempt
    finished: int = 0  # rows
    blocks_pulled: int = 0  # moved between pools
    ignored_commits: int = 0  # named a block that the row does not own: a worker's bug
    step_sizes: list[int] = field(default_factory=lambda: [0] * STEP_SIZES)
    step_tokens: int = 0

    def add_steps(self, sizes: list[int], tokens: int) -> None:
        """Steps by size, from a worker's report."""
        for size, steps in enumerate(sizes[:STEP_SIZES]):
            self.step_sizes[size] += steps
        self.step_tokens += tokens


class Runs:
    """`on_drained(row)` is called after the blocks of a row were released, in its holding state;
    `wake(rows, block)` when the block that they waited for is there, or will never be."""

    def __init__(
        self,
        options: SchedulerOptions,
        cache: CacheOptions,
        members: Members,
        rows: RowTable,
        outbox: Outbox,
        on_drained: Callable[[Row], None],
        wake: Callable[[list[Row], BlockHash], None],
    ) -> None:
        self.counts = RunCounts()
        self.room_version = 0  # raised whenever a waiting row might fit that did not before
        self._options = options
        self._headroom = options.headroom_blocks
        self._cache = cache
        self._members = members
        self._rows = rows
        self._outbox = outbox
        self._on_drained = on_drained
        self._wake = wake

    # ---- onto workers --------------------------------------------------------------------------

    def blocks_at_start(self, row: Row) -> int:
        """Table length when placed: tokens and headroom, or all if it is never preempted again."""
        most = row.blocks_max_wanted(self._cache.block_size)
        if row.preemptions >= self._options.preemptions_max:
            return most
        tokens = blocks_for(row.tokens_wanted(), self._cache.block_size)
        return min(most, tokens + self._options.headroom_blocks)

    def start(self, row: Row, placement: Placement, alone: bool) -> None:
        """Takes blocks, on both sides of a handoff, and seats; and sends the assignments."""
        pool, seats, prefill = placement.pool, placement.seats, placement.prefill
        pool.ledger.share(placement.found)
        row.table = placement.found + pool.ledger.allocate(placement.num_new)
        row.pool = row.prefill_pool = pool.id
        row.source = None
        if prefill is not None:
            prefill.pool.ledger.share(prefill.found)
            table = prefill.found + prefill.pool.ledger.allocate(prefill.num_new)
            num_hit = len(prefill.found)
            row.source = Source(prefill.pool.id, table, num_hit, prefill.num_start, num_hit)
            row.source.is_head = prefill.tail_tokens is not None
            row.prefill_pool = prefill.pool.id
        row.ref = SeqRef(row.key[0], row.key[1], row.wanted.attempt)
        row.num_tokens = row.tokens_wanted()
        row.num_hit = row.num_committed = len(placement.found)
        row.blocks_base = blocks_for(row.num_tokens, self._cache.block_size)
        row.blocks_max = row.blocks_max_wanted(self._cache.block_size)
        row.alone, row.poison, row.finished_on = alone, False, None
        decoder = seats.decoder if seats.decoder is not None else seats.first
        row.decoder = decoder.id
        seats.first.expect_prefill(placement.uncached_tokens)
        if prefill is not None and prefill.tail_tokens is not None:
            decoder.expect_prefill(prefill.tail_tokens)
        self._rows.move(row, RowEvent.PLACE)
        self.counts.placed += 1
        pool.num_running += 1
        if row.preemptions < self._options.preemptions_max:
            priority, rank, arrival, choice = row.order
            pool.victims.push(row, (-priority, -rank, -arrival, -choice))
        self._announce(row)
        assert row.ref is not None
        self._outbox.to_owner(row.entry, Placed(self._outbox.epoch, row.ref))
        if decoder is not seats.first:
            rest = row.source is not None and row.source.is_head
            self._assign(row, decoder, Role.LOCAL if rest else Role.DECODE, seats.first)
            self._assign(row, seats.first, Role.PREFILL, decoder)
        else:
            self._assign(row, decoder, Role.LOCAL, None)

    def _assign(self, row: Row, worker: Worker, role: Role, peer: Worker | None) -> None:
        row.holds[worker.id] = role
        worker.assigned[row.key] = row
        message = assignment(
            self._outbox.epoch, self._cache, self._members, row, worker, role, peer
        )
        self._outbox.to_worker(worker, message)

    def _announce(self, row: Row) -> None:
        """Lets others wait for the prompt blocks that this row is about to compute."""
        if not self._cache.enable_prefix_caching:
            return
        num_hit = row.num_hit if row.source is None else row.source.num_start
        if not row.wanted.want_prompt_logprobs:
            self.counts.prefix_queries += row.num_tokens
            self.counts.prefix_hits += num_hit * self._cache.block_size
        computing = self._members.pools[row.prefill_pool].computing
        end = self._num_full(row) if row.source is None else len(row.source.table)
        for name in row.wanted.hashes[num_hit : min(end, self._num_full(row))]:
            if name not in computing:
                computing[name] = row
                row.computing.append(name)

    # ---- growth --------------------------------------------------------------------------------

    def commit(self, row: Row, pool: Pool, block: CommittedBlock) -> None:
        """A block of the row is full: others may share it, and the row gets another one."""
        index = block.index
        owned = 0 <= index < len(row.table) and row.table[index] == block.block
        if not owned or not pool.ledger.commit(
            block.block, block.generation, block.hash, block.parent
        ):
            self.counts.ignored_commits += 1
            return
        if index >= row.num_committed:
            row.num_committed = index + 1
        if row.computing:
            self._computed(pool, row, block.hash)
        if row.state is RowState.RUNNING:
            self.extend(row, pool)

    def commit_source(self, row: Row, source: Source, block: CommittedBlock) -> None:
        """A block of the prompt is full on the prefill side: others there may share it."""
        pool, index = self._members.pools[source.pool], block.index
        owned = 0 <= index < len(source.table) and source.table[index] == block.block
        if not owned or not pool.ledger.commit(
            block.block, block.generation, block.hash, block.parent
        ):
            self.counts.ignored_commits += 1
            return
        source.num_committed = max(source.num_committed, index + 1)
        if row.computing:
            self._computed(pool, row, block.hash)

    def land(self, row: Row, role: Role, landed: Landed) -> None:
        """A side has all blocks that it lacked, and reads the other pool no more."""
        self.counts.blocks_pulled += landed.num_blocks
        source = row.source
        if source is None:
            return
        if role is Role.PREFILL:  # the decode side's blocks stay in any case
            cost = self._members.pair_cost(row.pool, source.pool)
            cost.observe(landed.num_blocks, landed.read_s)
            return
        self._members.pair_cost(source.pool, row.pool).observe(landed.num_blocks, landed.read_s)
        source.landed = True
        if source.is_head:
            self.confirm_seal(row)
        self._free_source(row, source)

    def _free_source(self, row: Row, source: Source) -> None:
        """Gives the prefill side's blocks back once neither side touches them."""
        if not source.landed or Role.PREFILL in row.holds.values():
            return
        row.source = None
        self._release(self._members.pools[source.pool], source.table)

    def _release(self, pool: Pool, table: list[BlockId]) -> None:
        pool.ledger.release(table)
        self.room_version += 1
        self._feed(pool)

    def _computed(self, pool: Pool, row: Row, name: BlockHash) -> None:
        if pool.computing.get(name) is row:
            del pool.computing[name]
            waiters = pool.waiters.pop(name, None)
            if waiters is not None:
                self._wake(waiters, name)

    def extend(self, row: Row, pool: Pool) -> None:
        """Grants up to the block being written and the headroom; without room, makes some."""
        target = max(row.blocks_base, row.num_committed + 1) + self._headroom
        if target > row.blocks_max:
            target = row.blocks_max
        have = len(row.table)
        if have >= target:
            pool.hungry.discard(row)
            return
        give = pool.ledger.up_to(target - have)
        if give:
            decoder = row.decoder
            assert row.ref is not None
            assert decoder in row.holds
            worker = self._members.workers[decoder]
            blocks = pool.ledger.allocate(give)
            of_pool = pool.ledger.generations
            generations = [of_pool[block] for block in blocks]
            self._outbox.grant(worker, Grant(row.ref, have, blocks, generations))
            row.table += blocks
        if have + give >= target:
            pool.hungry.discard(row)
            return
        if row not in pool.hungry:
            pool.hungry.push(row, row.order)
        if len(row.table) <= row.num_committed:
            self._preempt(pool)

    def _preempt(self, pool: Pool) -> None:
        """Takes the newest row of the lowest priority back, unless blocks are coming anyway."""
        if pool.num_draining:
            return
        victim = pool.victims.peek()
        assert victim is not None, "a row that asks for blocks may itself be preempted"
        victim.preemptions += 1
        victim.cause = LossCause.PREEMPTED
        self.counts.preemptions += 1
        self._rows.move(victim, RowEvent.PREEMPT)
        self.take_back(victim)

    def displace(self, row: Row) -> None:
        """Takes a running row back because it is better off elsewhere: no preemption of its own."""
        row.cause = LossCause.MOVED
        self._rows.move(row, RowEvent.PREEMPT)
        self.take_back(row)

    # ---- back from workers ---------------------------------------------------------------------

    def finish(self, row: Row, worker: Worker) -> None:
        """The sequence ended by itself. A prefill side's first token may be its last."""
        if row.state is RowState.FINISHING:  # the other side said so before
            self.let_go(row, worker)
            return
        was_running = row.state is RowState.RUNNING
        if self._rows.move(row, RowEvent.FINISH) is RowState.FINISHING:
            row.finished_on = worker.id
            worker.finished[row.key] = row
        row.faults = 0
        self.counts.finished += was_running
        if was_running and row.holds[worker.id] is not Role.DECODE:
            self.take_back(row, but=worker)
        elif was_running:
            self._stop(row)
        self.let_go(row, worker)

    def lose(self, row: Row, worker: Worker, cause: LossCause) -> None:
        """The worker is fenced, or gave the row back unasked."""
        if row.state is RowState.FINISHING:  # the other side finished it; nothing is lost
            self.let_go(row, worker)
            return
        was_running = row.state is RowState.RUNNING
        row.cause = cause
        self._rows.move(row, RowEvent.DOWN)
        if was_running:
            self.take_back(row, but=worker)
        self.let_go(row, worker)

    def seal(self, row: Row, worker: Worker) -> None:
        """The prefill side is done. Its seal takes another way than its report, and may be lost
        with it: until the decode side reports, the row depends on both."""
        is_here = row.source is not None and row.source.is_head and row.source.landed
        self.let_go(row, worker)
        if row.state is RowState.RUNNING and not is_here:
            row.sealed_on = worker.id
            worker.sealed[row.key] = row

    def confirm_seal(self, row: Row) -> None:
        """The decode side computes, or the row does not run any more."""
        if row.sealed_on is not None:
            worker = self._members.workers.get(row.sealed_on)
            if worker is not None:
                worker.sealed.pop(row.key, None)
            row.sealed_on = None

    def lose_sealed(self, row: Row) -> None:
        """The worker that sealed it is fenced, and the seal may never have left."""
        row.sealed_on, row.cause = None, LossCause.WORKER
        self._rows.move(row, RowEvent.DOWN)
        self.take_back(row)

    def take_back(self, row: Row, but: Worker | None = None) -> None:
        """Revokes a row that just left RUNNING. Its blocks stay owned until all let go."""
        assert row.ref is not None
        self._stop(row)
        for worker in row.holds:
            if but is None or worker != but.id:
                self._outbox.revoke(self._members.workers[worker], row.ref)

    def _stop(self, row: Row) -> None:
        """It asks for nothing any more, and its blocks will come back."""
        assert row.state is not RowState.RUNNING
        self.confirm_seal(row)
        pool = self._members.pools[row.pool]
        pool.hungry.discard(row)
        pool.victims.discard(row)
        pool.num_draining += 1

    def let_go(self, row: Row, worker: Worker) -> None:
        """The worker touches no block of the row any more: it said so, or was fenced."""
        role = row.holds.pop(worker.id)
        del worker.assigned[row.key]
        self.room_version += 1
        if not worker.assigned:
            worker.backlog_tokens = 0
        elif role is not Role.DECODE:
            done = row.num_committed if row.source is None else row.source.num_committed
            unread = max(0, self._num_full(row) - done) * self._cache.block_size
            worker.backlog_tokens = max(0, worker.backlog_tokens - unread)
        if not row.holds:
            self._drain(row)
        elif row.source is not None:
            self._free_source(row, row.source)

    def _drain(self, row: Row) -> None:
        pool = self._members.pools[row.pool]
        assert row.state is not RowState.RUNNING
        table, row.table = row.table, []
        source, row.source = row.source, None
        pool.ledger.release(table)
        pool.num_running -= 1
        pool.num_draining -= 1
        prefill_pool = self._members.pools.get(row.prefill_pool)
        if prefill_pool is not None:  # else its host is lost
            for name in row.computing:
                self._computed(prefill_pool, row, name)
        row.computing = []
        self._on_drained(row)
        self._feed(pool)
        if source is not None:
            self._release(self._members.pools[source.pool], source.table)

    def _num_full(self, row: Row) -> int:
        """Blocks that are full once the prompt, and what was emitted before, are computed."""
        return row.num_tokens // self._cache.block_size

    def _feed(self, pool: Pool) -> None:
        """Gives blocks that came back to the rows that lack some, in order."""
        while (row := pool.hungry.peek()) is not None:
            self.extend(row, pool)
            if row in pool.hungry or row.state is not RowState.RUNNING:
                return
