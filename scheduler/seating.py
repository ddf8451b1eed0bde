"""Which waiting row is placed next, and where.

Owns the rules of the queue's head: strict order, so that whoever is first gets the room that comes
free; a row whose prefix another row computes waits for it when that is cheaper; a suspect runs
alone. Invariant: a row that could be placed is not left waiting behind one that is merely held.
"""

from collections.abc import Callable
from dataclasses import replace

from diptych.engine.core.config import CacheOptions
from diptych.engine.core.messages import Failed
from diptych.engine.core.request import SeqRef
from diptych.engine.core.types import BlockHash, BlockId, Role, blocks_for
from diptych.scheduler.lifecycle import RowEvent, RowState
from diptych.scheduler.members import Members, Pool, PoolPhase, Worker
from diptych.scheduler.outbox import Outbox
from diptych.scheduler.placement import Placement, Placer, PrefillSide, Seats
from diptych.scheduler.queue import WaitingRoom
from diptych.scheduler.rows import Row, RowTable
from diptych.scheduler.runs import Runs


class Seating:
    def __init__(
        self,
        cache: CacheOptions,
        members: Members,
        rows: RowTable,
        room: WaitingRoom,
        runs: Runs,
        placer: Placer,
        outbox: Outbox,
    ) -> None:
        self._cache = cache
        self._members = members
        self._rows = rows
        self._room = room
        self._runs = runs
        self._placer = placer
        self._outbox = outbox
        self._stuck: tuple[Row, int, int] | None = None  # (row, attempt, room version): no place

    def place_waiting(self) -> None:
        if not self._place_suspect():
            return
        while (row := self._room.ready.peek()) is not None:
            attempt = (row, row.wanted.attempt, self._runs.room_version)
            if attempt == self._stuck:
                return
            if not self._place(row):
                self._stuck = attempt
                return

    def fits(self, row: Row, pool: Pool) -> bool:
        """The row, alone in the pool, could be computed to its end."""
        return row.blocks_max_wanted(self._cache.block_size) <= pool.ledger.num_blocks

    def _usable_pools(self) -> list[Pool]:
        pools = self._members.pools.values()
        return [pool for pool in pools if pool.phase is PoolPhase.USABLE]

    def _place(self, row: Row) -> bool:
        """False: there is no place now. True: the row left the head of the queue."""
        pools = [pool for pool in self._usable_pools() if self.fits(row, pool)]
        if not pools and self._is_hopeless(row):
            return True
        best = self._best(row, pools)
        if best is None:
            return False
        awaited = self._worth_waiting_for(row, best)
        if awaited is not None:
            self._room.hold(row, awaited)
            pool = best.pool if best.prefill is None else best.prefill.pool
            pool.waiters.setdefault(awaited, []).append(row)
            return True
        self._start(row, best, alone=False)
        return True

    def _start(self, row: Row, placement: Placement, alone: bool) -> None:
        self._room.leave(row)
        self._room.rate.placed()
        self._runs.start(row, placement, alone)

    def _is_hopeless(self, row: Row) -> bool:
        """Ends a row that fits no pool of all those there will be."""
        most, need = self._members.largest_pool(), row.blocks_max_wanted(self._cache.block_size)
        if most is None or need <= most:
            return False
        self._room.leave(row)
        self._rows.move(row, RowEvent.FAIL)
        reason = f"the request needs {need} KV blocks, more than any pool has"
        ref = SeqRef(row.key[0], row.key[1], row.wanted.attempt)
        self._outbox.to_owner(row.entry, Failed(self._outbox.epoch, ref, reason))
        return True

    def _found(self, row: Row, pool: Pool) -> list[BlockId]:
        """The longest cached prefix; the last token is always computed."""
        if not self._cache.enable_prefix_caching or row.wanted.want_prompt_logprobs:
            return []
        limit = (row.tokens_wanted() - 1) // self._cache.block_size
        return pool.ledger.cache.longest(row.wanted.hashes, limit)

    def _best(self, row: Row, homes: list[Pool]) -> Placement | None:
        """The cheapest of: one pool, a pair of pools, and everything where it decodes."""
        options = [self._inside(row, pool, self._placer.seats) for pool in homes]
        if self._members.apart:
            self._placer.stand_in = self._members.must_stand_in()
            need = blocks_for(row.tokens_wanted(), self._cache.block_size)
            pairs = self._pairs(row, homes, need)
            options += pairs
            options += self._heads(row, homes)
            alone = bool(pairs or row.failed_pulls or self._placer.stand_in)
            able = [pool for pool in homes if alone or not self._may_prefill(need, pool)]
            options += [self._inside(row, pool, self._placer.local) for pool in able]
        found = [placement for placement in options if placement is not None]
        best = min(found, key=lambda placement: placement.seats.score_s, default=None)
        if best is not None and best.prefill is None:
            for passed_over in found:
                if passed_over.prefill is not None:
                    cost = self._members.pair_cost(passed_over.prefill.pool.id, passed_over.pool.id)
                    cost.relax()
        return best

    def _pairs(self, row: Row, homes: list[Pool], need: int) -> list[Placement]:
        if row.failed_pulls:  # what could not be moved once is computed where it is needed
            return []
        sides = [self._side(row, pool, need) for pool in self._usable_pools()]
        pairs = [self._across(row, home, side) for home in homes for side in sides if side]
        return [pair for pair in pairs if pair is not None]

    def _heads(self, row: Row, homes: list[Pool]) -> list[Placement]:
        """The first part of the prompt from another pool, the rest where it decodes."""
        if row.failed_pulls or row.wanted.want_prompt_logprobs:
            return []
        size = self._cache.block_size
        tail = (row.tokens_wanted() - self._placer.local_prefill_tokens) // size
        heads: list[Placement | None] = []
        for home in homes:
            for pool in self._usable_pools():
                if pool is not home and not self._members.refusal(pool.id, home.id):
                    cached = len(self._found(row, pool))
                    ends = {end for end in (cached, tail) if end * size < row.tokens_wanted()}
                    heads += [self._head(row, home, pool, end) for end in sorted(ends)]
        return [head for head in heads if head is not None]

    def _head(self, row: Row, home: Pool, pool: Pool, end: int) -> Placement | None:
        """Blocks [0, end) of the table come from `pool`, cached there or computed there."""
        size = self._cache.block_size
        side = self._side(row, pool, end)
        need = self._runs.blocks_at_start(row)
        found = self._room_in(row, home, need)
        if side is None or found is None or end <= len(found) or len(side.found) > end:
            return None
        worker = self._placer.prefiller(pool) if side.num_new else self._placer.reader(pool)
        decoder = self._placer.decoder(home)
        if worker is None or decoder is None:
            return None
        compute_s, uncached = 0.0, side.num_new * size
        if uncached:
            compute_s = (worker.backlog_tokens + uncached) * worker.cost.prefill_s
            compute_s *= 100.0 / worker.dial
        moved = self._members.pair_cost(pool.id, home.id).exposed_s(end - len(found), compute_s)
        tail = row.tokens_wanted() - end * size
        local = self._placer.local_at(decoder, tail, compute_s + moved)
        seats = Seats(worker, decoder, local.ttft_s, local.score_s)
        side = replace(side, tail_tokens=tail)
        return Placement(home, seats, found, need - len(found), uncached, side)

    def _may_prefill(self, need: int, home: Pool) -> bool:
        """Whether a worker lives that prefills for `home`, in a pool that can hold the prompt."""
        return any(
            worker.dial > 0
            for pool in self._usable_pools()
            if need <= pool.ledger.num_blocks and not self._members.refusal(pool.id, home.id)
            for worker in pool.workers.values()
        )

    def _inside(
        self, row: Row, pool: Pool, choose: Callable[[Pool, int], Seats | None]
    ) -> Placement | None:
        found = self._room_in(row, pool, self._runs.blocks_at_start(row))
        if found is None:
            return None
        num_new = self._runs.blocks_at_start(row) - len(found)
        uncached = row.tokens_wanted() - len(found) * self._cache.block_size
        seats = choose(pool, uncached)
        return None if seats is None else Placement(pool, seats, found, num_new, uncached)

    def _side(self, row: Row, pool: Pool, need: int) -> PrefillSide | None:
        found = self._room_in(row, pool, need)
        return None if found is None else PrefillSide(pool, found, need - len(found), len(found))

    def _across(self, row: Row, home: Pool, side: PrefillSide) -> Placement | None:
        """Prefill in one pool, decode in another: blocks are allocated in both, or in neither."""
        if side.pool is home or self._members.refusal(side.pool.id, home.id):
            return None
        prefiller, decoder = self._placer.prefiller(side.pool), self._placer.decoder(home)
        found = self._room_in(row, home, self._runs.blocks_at_start(row))
        if prefiller is None or decoder is None or found is None:
            return None
        num_moved = len(side.found) + side.num_new - len(found)
        side, prefix_s = self._with_prefix(side, home, prefiller, len(found))
        uncached = row.tokens_wanted() - side.num_start * self._cache.block_size
        cost = self._members.pair_cost(side.pool.id, home.id)
        exposed_s = cost.exposed_s(num_moved, uncached * prefiller.cost.prefill_s)
        seats = self._placer.across(prefiller, decoder, uncached, prefix_s + exposed_s)
        num_new = self._runs.blocks_at_start(row) - len(found)
        return Placement(home, seats, found, num_new, uncached, side)

    def _with_prefix(
        self, side: PrefillSide, home: Pool, prefiller: Worker, num_known: int
    ) -> tuple[PrefillSide, float]:
        """The prefill side begins with what only `home` knows, if moving that is cheaper than
        computing it (a conversation's next turn); and the seconds that it waits for it."""
        count = num_known - len(side.found)
        cost = self._members.pair_cost(home.id, side.pool.id)
        compute_s = count * self._cache.block_size * prefiller.cost.prefill_s
        if count <= 0 or count * cost.block_s >= compute_s:
            if count > 0:
                cost.relax()
            return side, 0.0
        return replace(side, num_start=num_known), count * cost.block_s

    def _room_in(self, row: Row, pool: Pool, need: int) -> list[BlockId] | None:
        """The cached prefix there; None if the rest of `need` blocks is not to be had."""
        if len(pool.hungry):  # rows that run come first
            return None
        found = self._found(row, pool)
        return found if need - len(found) <= pool.ledger.num_available_beside(found) else None

    def _worth_waiting_for(self, row: Row, placement: Placement) -> BlockHash | None:
        """The last of the blocks that another row is computing, if waiting beats computing."""
        if not self._cache.enable_prefix_caching or row.wanted.want_prompt_logprobs:
            return None
        hashes, size = row.wanted.hashes, self._cache.block_size
        side = placement.prefill
        if side is not None and side.tail_tokens is not None:
            return None
        start = end = len(placement.found) if side is None else side.num_start
        limit = min(len(hashes), (row.tokens_wanted() - 1) // size)
        computing = (placement.pool if side is None else side.pool).computing
        owner = computing.get(hashes[start]) if start < limit else None
        if owner is None or owner.state is not RowState.RUNNING:
            return None
        while end < limit and computing.get(hashes[end]) is owner:
            end += 1
        wait_s = 0.0  # sealed: the report of its last blocks is on its way
        for worker_id, role in owner.holds.items():
            if role is Role.DECODE:
                continue
            writer = self._members.workers[worker_id]
            at = owner if owner.source is None else owner.source
            tokens = max(0, end - at.num_committed) * size
            if at.num_committed == at.num_hit:  # others may be before it
                tokens = max(tokens, writer.backlog_tokens)
            wait_s = tokens * writer.cost.prefill_s
        rest = placement.uncached_tokens - (end - start) * size
        wait_s += rest * placement.seats.first.cost.prefill_s
        return hashes[end - 1] if wait_s <= placement.seats.ttft_s else None

    def _place_suspect(self) -> bool:
        """One suspect at a time, on a worker emptied for it. False: it needs blocks, so nobody
        else may take any."""
        row = self._room.suspects.peek()
        if row is None:
            ward = self._placer.ward
            if ward is not None and not ward.assigned:
                self._make_ward(None)
            return True
        pools = [pool for pool in self._usable_pools() if self.fits(row, pool)]
        if not pools:
            self._is_hopeless(row)
            return True
        ward = self._choose_ward(pools)
        if ward is None or ward.assigned:
            return True
        pool = self._members.pools[ward.pool]
        found = self._found(row, pool)
        num_new = self._runs.blocks_at_start(row) - len(found)
        if len(pool.hungry) or num_new > pool.ledger.num_available_beside(found):
            return False
        uncached = row.tokens_wanted() - len(found) * self._cache.block_size
        seats = Seats(ward, None, 0.0, 0.0)
        self._start(row, Placement(pool, seats, found, num_new, uncached), alone=True)
        return True

    def _choose_ward(self, pools: list[Pool]) -> Worker | None:
        """The worker that is emptied, and kept free, for suspects. While nobody runs alone on it,
        one that is empty already (say, just restarted) takes its place."""
        ward = self._placer.ward
        if ward is not None and any(row.alone for row in ward.assigned.values()):
            return ward
        workers = [worker for pool in pools for worker in pool.workers.values() if worker.serves]
        best = min(workers, key=lambda w: (len(w.assigned), w is not ward, w.id), default=None)
        usable = ward is not None and ward in workers
        if best is not ward and (not usable or (best is not None and not best.assigned)):
            self._make_ward(best)
        return self._placer.ward

    def _make_ward(self, worker: Worker | None) -> None:
        self._placer.ward = worker
        self._runs.room_version += 1
