"""What a worker is told of a row that was just placed: its blocks, and what has to move. Pure.

Owns nothing. Invariant: the blocks before `num_computed` are in the worker's own pool; every block
that is to move is named with the generation that it has in its source pool.
"""

from diptych.engine.core.config import CacheOptions
from diptych.engine.core.messages import Assign, Handoff
from diptych.engine.core.types import BlockId, Epoch, PoolId, Role
from diptych.scheduler.members import Members, Worker
from diptych.scheduler.rows import Row, Source


def assignment(
    epoch: Epoch,
    cache: CacheOptions,
    members: Members,
    row: Row,
    worker: Worker,
    role: Role,
    peer: Worker | None,
) -> Assign:
    assert row.ref is not None
    table, num_hit = row.table, row.num_hit
    if row.source is not None and role is Role.PREFILL:
        table, num_hit = row.source.table, row.source.num_hit
    generations = members.pools[worker.pool].ledger.generations
    return Assign(
        scheduler_epoch=epoch,
        worker_epoch=worker.epoch,
        ref=row.ref,
        request=row.entry.request,
        role=role,
        emitted=row.wanted.emitted,
        hashes=row.wanted.hashes,
        block_table=list(table),
        generations=[generations[block] for block in table],
        num_computed=num_hit * cache.block_size,
        api=row.entry.api,
        api_epoch=row.entry.api_epoch,
        peer=None if peer is None else (peer.id, peer.epoch),
        want_prompt_logprobs=row.wanted.want_prompt_logprobs,
        handoff=handoff(members, row, role),
        prefix=prefix(members, row, role),
        head=head(row, role, cache.block_size),
    )


def handoff(members: Members, row: Row, role: Role) -> Handoff | None:
    """What has to move: the blocks of the prompt that the decode side's pool lacks."""
    source = row.source
    if source is None or (source.is_head and role is Role.LOCAL):
        return None
    if role is Role.PREFILL:
        return Handoff(row.pool, row.num_hit, [], [])
    return _blocks(members, source.pool, source.table[row.num_hit :], row.num_hit)


def prefix(members: Members, row: Row, role: Role) -> Handoff | None:
    """What moves before a prefill: blocks that only the decode side knows, to the prefill side; or
    the head that the prefill side has or computes, to the side that computes the rest."""
    source = row.source
    if source is None:
        return None
    if source.is_head and role is Role.LOCAL:
        return _blocks(members, source.pool, source.table[row.num_hit :], row.num_hit)
    if source.num_start == source.num_hit:
        return None
    if role is Role.DECODE:
        return Handoff(source.pool, source.num_hit, [], [])
    known = row.table[source.num_hit : source.num_start]
    return _blocks(members, row.pool, known, source.num_hit)


def head(row: Row, role: Role, block_size: int) -> int | None:
    """Tokens of the part that is computed apart: all, or what of it was cached."""
    source: Source | None = row.source
    if source is None or not source.is_head:
        return None
    num_blocks = len(source.table) if role is Role.PREFILL else source.num_hit
    return num_blocks * block_size


def _blocks(members: Members, pool: PoolId, blocks: list[BlockId], first: int) -> Handoff:
    generations = members.pools[pool].ledger.generations
    return Handoff(pool, first, blocks, [generations[block] for block in blocks])
