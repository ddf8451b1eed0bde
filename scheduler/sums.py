"""The scheduler's sums for API servers: what metrics and `diptych status` show.

Owns nothing. Invariant: taking them changes nothing, and costs as much as there are workers and
pools, whatever runs.
"""

from diptych.engine.core.messages import PairStats, PoolStats, Stats, WorkerStats
from diptych.engine.core.types import Epoch
from diptych.scheduler.intake import Intake
from diptych.scheduler.lifecycle import HOLDING
from diptych.scheduler.members import Members, Pool, Worker
from diptych.scheduler.queue import WaitingRoom
from diptych.scheduler.rows import RowTable
from diptych.scheduler.runs import RunCounts
from diptych.scheduler.steering import Steering


def take_stats(
    epoch: Epoch,
    members: Members,
    rows: RowTable,
    room: WaitingRoom,
    counts: RunCounts,
    intake: Intake,
    steering: Steering,
    ready: bool,
) -> Stats:
    pools = [_pool(pool) for pool in sorted(members.living_pools(), key=lambda p: p.id)]
    load, scaling = steering.load, steering.scaling
    return Stats(
        scheduler_epoch=epoch,
        running=sum(rows.counts[state] for state in HOLDING),
        waiting=room.num_rows,
        blocks_total=sum(pool.blocks_total for pool in pools),
        blocks_used=sum(pool.blocks_used for pool in pools),
        blocks_cached=sum(pool.blocks_cached for pool in pools),
        prefix_queries=counts.prefix_queries,
        prefix_hits=counts.prefix_hits,
        preemptions=counts.preemptions,
        rejections=intake.rejections,
        losses=intake.losses,
        prefill_tokens=counts.prefill_tokens,
        workers=[_worker(w) for w in sorted(members.workers.values(), key=lambda w: w.id)],
        ready=ready,
        blocks_pulled=counts.blocks_pulled,
        pools=pools,
        pairs=[
            PairStats(source, own, cost.num_blocks, cost.block_s, members.refusal(source, own))
            for source, own, cost in members.pairs()
            if cost.num_blocks or members.refusal(source, own)
        ],
        dial_moves=steering.moves,
        pressure=None if load is None else (min(load.prefill, 1e6), min(load.decode, 1e6)),
        workers_wanted=None if scaling is None else scaling.wanted,
        cold_start=None if scaling is None else scaling.cold_start,
        workers_asked=0 if scaling is None else scaling.asked,
        workers_retired=0 if scaling is None else scaling.retired,
        step_sizes=list(counts.step_sizes),
        step_tokens=counts.step_tokens,
    )


def _pool(pool: Pool) -> PoolStats:
    ledger = pool.ledger
    return PoolStats(pool.id, ledger.num_blocks, ledger.num_used, ledger.num_cached)


def _worker(worker: Worker) -> WorkerStats:
    return WorkerStats(
        worker.id,
        worker.epoch,
        worker.dial,
        len(worker.assigned),
        worker.steps,
        worker.step_s,
        worker.pool,
        worker.leaving,
        worker.decode_tokens,
        worker.prefill_tokens,
    )
