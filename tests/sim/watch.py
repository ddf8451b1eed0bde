"""Who may touch which block: an ownership model of the simulator's own.

It never asks the scheduler's ledger. A sequence of a worker holds blocks from the moment an
`Assign` or `Grant` leaves the scheduler until the scheduler has processed its finished, sealed or
released, a `Joined` of a newer epoch, or the `WorkerDown` of a fenced worker. Invariants: a block
is written by its one holder at its generation, never after it was committed; it is given away only
when nobody else holds it and its generation was raised; a shared block's content is right.
"""

from dataclasses import dataclass, field

from diptych.engine.core.messages import (
    Address,
    Assign,
    Grant,
    Grants,
    Handoff,
    Joined,
    Message,
    PoolDown,
    Progress,
    WorkerDown,
)
from diptych.engine.core.request import SeqRef, Sequence
from diptych.engine.core.types import (
    BlockHash,
    BlockId,
    Epoch,
    Generation,
    PoolId,
    Role,
    WorkerId,
    unpack_ids,
)
from tests.sim.memory import Memory
from tests.sim.model import Oracle
from tests.sim.names import Names
from tests.sim.world import check

HoldKey = tuple[WorkerId, Epoch, SeqRef]


@dataclass(slots=True)
class Hold:
    """The blocks that one sequence of one worker may touch."""

    pool: PoolId
    epoch: Epoch  # of the scheduler that gave them
    peer: WorkerId | None
    table: list[BlockId]
    generations: list[Generation]
    num_shared: int  # the first blocks: read only
    source: PoolId | None = None  # the pool that it reads from, of a peer elsewhere
    reads: list[BlockId] = field(default_factory=list)  # blocks there


@dataclass(slots=True)
class Block:
    generation: Generation = 0
    committed: bool = False
    holders: set[HoldKey] = field(default_factory=set)
    readers: set[HoldKey] = field(default_factory=set)  # pull it into another pool


def progress_key(progress: Progress, ref: SeqRef) -> HoldKey:
    return (progress.worker, progress.worker_epoch, ref)


class Watch:
    """See the module docstring."""

    def __init__(
        self,
        memories: dict[PoolId, Memory],
        pool_of: dict[WorkerId, PoolId],
        oracle: Oracle,
        sequences_max: int,
        caching: bool,
    ) -> None:
        self.memories = memories
        self.pool_of = pool_of
        self.oracle = oracle
        self.sequences_max = sequences_max
        self.caching = caching
        self.blocks = {
            pool: [Block() for _ in range(memory.num_blocks)] for pool, memory in memories.items()
        }
        self.names = {pool: Names() for pool in memories}
        self.holds: dict[HoldKey, Hold] = {}
        self.just_dropped: dict[HoldKey, Hold] = {}  # in the scheduler's present step
        self.lingering: dict[SeqRef, list[tuple[PoolId, BlockId]]] = {}  # see `_linger`
        self.epoch: Epoch = 0  # of the scheduler that runs
        self.readable: set[PoolId] = set()
        self.gone: set[tuple[WorkerId, Epoch]] = set()  # fenced, or lost with their host
        self.lost: set[WorkerId] = set()  # with their host: what they touch is nobody else's

    def add_pool(self, memory: Memory, workers: list[WorkerId]) -> None:
        """Another host joins."""
        self.blocks[memory.pool] = [Block() for _ in range(memory.num_blocks)]
        self.names[memory.pool] = Names()
        self.pool_of |= dict.fromkeys(workers, memory.pool)

    # ---- what the scheduler says ---------------------------------------------------------------

    def new_scheduler(self, epoch: Epoch) -> None:
        self.epoch = epoch
        self.readable = set()
        self.lingering.clear()
        for key in [key for key in self.holds if key[:2] in self.gone]:
            self._drop(key)  # it will never hear of this worker

    def pool_read(self, pool: PoolId) -> None:
        """A new scheduler has read the page: what it assigns next follows from that."""
        self.readable.add(pool)
        memory = self.memories[pool]
        self.names[pool].adopt(memory.read().entries)
        for i, block in enumerate(self.blocks[pool]):
            block.generation = memory.generation(i)
            block.committed = memory.is_valid(i)
            check(not block.holders, "pool {} is read while {} hold a block", pool, block.holders)
            block.readers.clear()  # for an older scheduler: what they read fails their checks

    def scheduler_sends(self, to: Address, message: Message) -> None:
        if isinstance(message, Assign):
            self._assign(to, message)
        elif isinstance(message, Grants):
            for grant in message.grants:
                self._grant(to, grant)

    def _assign(self, to: Address, message: Assign) -> None:
        worker, ref = to.number, message.ref
        pool = self.pool_of[worker]
        check(pool in self.readable, "{} is assigned before pool {} was read", ref, pool)
        size = self.memories[pool].block_size
        tokens = unpack_ids(message.request.prompt_ids) + unpack_ids(message.emitted)
        computed = message.num_computed
        check(computed % size == 0, "{}: hit of {} tokens is no whole block", ref, computed)
        check(computed < len(tokens), "{}: hit covers the last token", ref)
        all_tokens = tokens
        if message.role is Role.PREFILL and message.head is not None:
            tokens = tokens[: message.head]
            whole = message.head % size == 0 and message.head > 0
            check(whole and message.handoff is not None, "{}: head of {}", ref, message.head)
        check(len(message.block_table) * size >= len(tokens), "{}: table too short", ref)
        check(len(set(message.block_table)) == len(message.block_table), "{}: block twice", ref)
        check(not (message.want_prompt_logprobs and computed), "{}: hit hides logprobs", ref)
        check(self.caching or not computed, "{}: hit without a cache", ref)
        key = (worker, to.epoch, ref)
        on_worker = sum(other[:2] == key[:2] for other in self.holds)
        check(on_worker < self.sequences_max, "worker {} gets {} sequences", worker, on_worker + 1)
        check(key not in self.holds, "{} is assigned twice", key)
        peer = message.peer[0] if message.peer is not None else None
        hold = self.holds[key] = Hold(pool, message.scheduler_epoch, peer, [], [], computed // size)
        for i, (block, generation) in enumerate(
            zip(message.block_table, message.generations, strict=True)
        ):
            if i < hold.num_shared:
                self._share(ref, pool, block, generation, message.hashes[i])
            else:
                self._give(key, hold, block, generation)
            hold.table.append(block)
            hold.generations.append(generation)
            self.blocks[pool][block].holders.add(key)
        if message.handoff is not None and message.role is Role.DECODE:
            self._reads(key, hold, message)
        elif message.prefix is not None:
            is_head = message.role is Role.LOCAL
            self._reads_prefix(key, hold, message.prefix, message.hashes, is_head)
            end = message.prefix.first + len(message.prefix.blocks)
            check(end * size < len(all_tokens), "{}: the last token is not computed", ref)

    def _reads(self, key: HoldKey, hold: Hold, message: Assign) -> None:
        """The decode side of a handoff between pools reads blocks of the other one."""
        handoff, ref = message.handoff, message.ref
        assert handoff is not None
        check(handoff.pool != hold.pool, "{}: handoff inside pool {}", ref, handoff.pool)
        check(handoff.pool in self.readable, "{}: handoff from pool {}", ref, handoff.pool)
        check(handoff.first == hold.num_shared, "{}: pulls what is here", ref)
        size = self.memories[hold.pool].block_size
        num_tokens = message.request.num_prompt + len(message.emitted) // 4
        due = -(-num_tokens // size) - handoff.first
        check(len(handoff.blocks) == due, "{}: pulls {} blocks", ref, len(handoff.blocks))
        hold.source, hold.reads = handoff.pool, list(handoff.blocks)
        for block in handoff.blocks:
            self.blocks[handoff.pool][block].readers.add(key)

    def _reads_prefix(
        self,
        key: HoldKey,
        hold: Hold,
        prefix: Handoff,
        hashes: list[BlockHash],
        is_head: bool,
    ) -> None:
        """It begins with blocks of the other pool: cached there, or computed there for it."""
        check(prefix.first == hold.num_shared, "{}: pulls what is here", key)
        check(prefix.pool in self.readable, "{}: reads in pool {}", key, prefix.pool)
        hold.source, hold.reads = prefix.pool, list(prefix.blocks)
        generations = zip(prefix.blocks, prefix.generations, strict=True)
        for i, (block, generation) in enumerate(generations, prefix.first):
            state = self.blocks[prefix.pool][block]
            if state.committed or not is_head:
                own = is_head and generation > state.generation  # given anew in this very step
                if not own:
                    self._share(key[2], prefix.pool, block, generation, hashes[i])
            self.blocks[prefix.pool][block].readers.add(key)

    def _share(
        self, ref: SeqRef, pool: PoolId, block: BlockId, generation: Generation, block_hash: bytes
    ) -> None:
        state = self.blocks[pool][block]
        check(state.committed, "{}: hit in block {}, which nobody committed", ref, block)
        check(state.generation == generation, "{}: hit in an old life of block {}", ref, block)
        content = self.memories[pool].cells[block]
        check(
            content == self.oracle.blocks.get(block_hash),
            "{}: block {} holds something else",
            ref,
            block,
        )

    def _give(self, key: HoldKey, hold: Hold, block: BlockId, generation: Generation) -> None:
        """The block becomes private to the sequence `key`, or to it and its peer."""
        state, ref = self.blocks[hold.pool][block], key[2]
        for other in state.readers:
            check(other[2] == ref, "block {} goes to {} while {} pulls it", block, key, other)
        for other in state.holders:
            same = other[2] == key[2] and other[0] == hold.peer
            check(same, "block {} goes to {} while {} holds it", block, key, other)
        if state.holders:
            check(state.generation == generation, "{}: peers differ in block {}", ref, block)
        else:
            check(
                generation > state.generation,
                "{}: generation of block {} was not raised",
                ref,
                block,
            )
        state.generation = generation
        if state.committed:
            state.committed = False
            if self.caching:
                self.names[hold.pool].give_away(block, self._unused(hold.pool))

    def _unused(self, pool: PoolId) -> set[BlockId]:
        """Blocks that nobody held or read since this step began."""
        unused = {i for i, b in enumerate(self.blocks[pool]) if not b.holders and not b.readers}
        dropped = self.just_dropped.values()
        for blocks in self.lingering.values():
            unused.difference_update(block for place, block in blocks if place == pool)
        return unused.difference(
            *(hold.table for hold in dropped), *(hold.reads for hold in dropped)
        )

    def _grant(self, to: Address, message: Grant) -> None:
        key = (to.number, to.epoch, message.ref)
        hold = self.holds.get(key)
        dropped = self.just_dropped.get(key)
        if hold is None and dropped is not None:
            # Granted and ended within one step of the scheduler: the worker will ignore it.
            for block, generation in zip(message.blocks, message.generations, strict=True):
                self._give(key, dropped, block, generation)
            return
        if hold is None:
            check(False, "{} is granted blocks but was not assigned", key)
            return
        check(
            message.first == len(hold.table),
            "{}: grant at {} of {}",
            key,
            message.first,
            len(hold.table),
        )
        for block, generation in zip(message.blocks, message.generations, strict=True):
            self._give(key, hold, block, generation)
            hold.table.append(block)
            hold.generations.append(generation)
            self.blocks[hold.pool][block].holders.add(key)

    # ---- what the scheduler has heard ----------------------------------------------------------

    def _has(self, key: HoldKey) -> bool:
        return key in self.holds and self.holds[key].epoch == self.epoch

    def begin_step(self) -> None:
        """The scheduler is about to hear what it will answer in one step."""
        self.just_dropped.clear()
        for names in self.names.values():
            names.begin_step()

    def scheduler_hears(self, epoch: Epoch, message: Message) -> None:
        if isinstance(message, Progress) and message.scheduler_epoch == epoch:
            for row in message.committed:
                state = self.blocks[self.pool_of[message.worker]][row.block]
                if state.generation == row.generation and self._has(progress_key(message, row.ref)):
                    state.committed = True
                    self.names[self.pool_of[message.worker]].commit(row)
            for landed in message.landed:
                self._stop_reading(progress_key(message, landed.ref))
            for ref in (*message.finished, *message.sealed, *message.released):
                self._drop(progress_key(message, ref))
        elif isinstance(message, Joined) and message.scheduler_epoch == epoch:
            self._drop_all(message.worker, message.worker_epoch, before=epoch)
        elif isinstance(message, WorkerDown):
            gone = (message.worker, message.worker_epoch) in self.gone
            check(gone, "worker {} is called down before its exit", message.worker)
            self._drop_all(message.worker, message.worker_epoch, before=None)
        elif isinstance(message, PoolDown):
            self.readable.discard(message.pool)

    def fenced(self, worker: WorkerId, worker_epoch: Epoch) -> None:
        """A worker is gone: what older schedulers gave it, no newer one will hear of."""
        self.gone.add((worker, worker_epoch))
        self._drop_all(worker, worker_epoch, before=self.epoch)

    def _stop_reading(self, key: HoldKey) -> None:
        hold = self.holds.get(key)
        if hold is not None and hold.source is not None:
            for block in hold.reads:
                self.blocks[hold.source][block].readers.discard(key)

    def _drop(self, key: HoldKey) -> None:
        self._stop_reading(key)
        hold = self.holds.pop(key, None)
        if hold is not None:
            self.just_dropped[key] = hold
            self._linger(key[2], hold)
            for block in hold.table:
                self.blocks[hold.pool][block].holders.discard(key)

    def _linger(self, ref: SeqRef, hold: Hold) -> None:
        """The attempt's blocks come back together, when its last worker has let go."""
        if any(other[2] == ref for other in self.holds):
            self.lingering.setdefault(ref, []).extend((hold.pool, block) for block in hold.table)
        else:
            self.lingering.pop(ref, None)

    def _drop_all(self, worker: WorkerId, worker_epoch: Epoch, before: Epoch | None) -> None:
        for key in list(self.holds):
            hold = self.holds[key]
            if key[:2] == (worker, worker_epoch) and (before is None or hold.epoch < before):
                self._drop(key)

    # ---- what the workers do -------------------------------------------------------------------

    def pull_write(
        self, worker: WorkerId, worker_epoch: Epoch, ref: SeqRef, block: BlockId
    ) -> None:
        """A read from another pool writes into `block`."""
        key = (worker, worker_epoch, ref)
        hold = self.holds.get(key)
        if hold is None or block not in hold.table:
            check(False, "{} pulls into block {}, which it does not hold", key, block)
            return
        i, memory = hold.table.index(block), self.memories[hold.pool]
        generation = hold.generations[i]
        check(i >= hold.num_shared, "{}: pulls into shared block {}", key, block)
        check(memory.generation(block) == generation, "{}: pulls into an old block {}", key, block)
        check(memory.committed(block) < generation, "{}: pulls into committed {}", key, block)
        state = self.blocks[hold.pool][block]
        check(state.holders == {key}, "{}: pulls into {}, held by {}", key, block, state.holders)

    def touch(
        self, worker: WorkerId, worker_epoch: Epoch, seq: Sequence, start: int, end: int
    ) -> None:
        """A step computes [start, end) of `seq`: it reads [0, end) and writes [start, end)."""
        key = (worker, worker_epoch, seq.ref)
        hold = self.holds.get(key)
        if hold is None:
            check(False, "{} computes without holding anything", key)
            return
        memory = self.memories[hold.pool]
        size = memory.block_size
        check(seq.block_table == hold.table[: len(seq.block_table)], "{}: wrong table", key)
        check(end <= len(seq.block_table) * size, "{}: writes past its table", key)
        for i in range(-(-end // size)):
            block = seq.block_table[i]
            state, on_page = self.blocks[hold.pool][block], memory.generation(block)
            generation = seq.generations[i]
            check(
                generation == state.generation == on_page,
                "{}: block {} has generation {}, owner {}, page {}",
                key,
                block,
                generation,
                state.generation,
                on_page,
            )
            if i >= start // size:
                check(i >= hold.num_shared, "{}: writes shared block {}", key, block)
                check(
                    not state.committed and memory.committed(block) != generation,
                    "{}: writes committed block {}",
                    key,
                    block,
                )
