"""A read-only picture of the scheduler for the simulator and for tests; never used in a decision.

Owns nothing. Invariant: taking it changes nothing and it holds no reference to living state.
"""

import msgspec

from diptych.engine.core.types import BlockId, PoolId, WorkerId
from diptych.scheduler.ledger import BlockState
from diptych.scheduler.lifecycle import RowState
from diptych.scheduler.members import Members, Pool, PoolPhase
from diptych.scheduler.queue import WaitingRoom
from diptych.scheduler.rows import Row, RowKey, RowTable


class RowAudit(msgspec.Struct, frozen=True):
    key: RowKey
    state: RowState
    attempt: int  # that runs, or is wanted
    pool: PoolId
    table: list[BlockId]
    source: tuple[PoolId, list[BlockId]] | None  # blocks held in another pool
    holds: list[WorkerId]  # workers that may touch its blocks
    held: bool  # waits for a block that another row computes
    preemptions: int
    faults: int


class PoolAudit(msgspec.Struct, frozen=True):
    phase: PoolPhase
    states: list[BlockState]  # by block
    generations: list[int]  # by block
    free: int
    private: int
    shared: int
    cached: int
    hungry: int  # rows that lack blocks
    draining: int  # rows that are being taken back


class SchedulerAudit(msgspec.Struct, frozen=True):
    pools: dict[PoolId, PoolAudit]
    rows: list[RowAudit]
    rows_by_state: dict[RowState, int]
    waiting: int  # rows that wait for a place, the held ones included
    waiting_tokens: int
    ignored_commits: int  # reports of blocks that their row does not own; 0 unless a worker lies
    ready: bool


def take_audit(
    members: Members, rows: RowTable, room: WaitingRoom, ignored_commits: int
) -> SchedulerAudit:
    return SchedulerAudit(
        pools={pool.id: _audit_pool(pool) for pool in members.pools.values()},
        rows=[_audit_row(row) for entry in rows.entries.values() for row in entry.rows.values()],
        rows_by_state=dict(rows.counts),
        waiting=room.num_rows,
        waiting_tokens=room.num_tokens,
        ignored_commits=ignored_commits,
        ready=members.is_ready(),
    )


def _audit_row(row: Row) -> RowAudit:
    attempt = row.wanted.attempt if row.ref is None else row.ref.attempt
    return RowAudit(
        key=row.key,
        state=row.state,
        attempt=row.wanted.attempt if row.state is RowState.QUEUED else attempt,
        pool=row.pool,
        table=list(row.table),
        source=None if row.source is None else (row.source.pool, list(row.source.table)),
        holds=list(row.holds),
        held=row.held_on is not None,
        preemptions=row.preemptions,
        faults=row.faults,
    )


def _audit_pool(pool: Pool) -> PoolAudit:
    states = pool.ledger.states()
    return PoolAudit(
        phase=pool.phase,
        states=states,
        generations=list(pool.ledger.generations),
        free=states.count(BlockState.FREE),
        private=states.count(BlockState.PRIVATE),
        shared=states.count(BlockState.SHARED),
        cached=states.count(BlockState.CACHED),
        hungry=len(pool.hungry),
        draining=pool.num_draining,
    )
