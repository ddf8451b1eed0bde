"""The central scheduler: messages in, commands out; no I/O, no clock, no randomness.

Owns every block of every pool, placement and the queue, through its parts: Intake (API servers'
requests), Seating (who is placed next), Runs (rows on workers), Members (who lives). Invariant: a
step's commands depend only on the inputs so far, and its cost on what changed, not on what runs.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

from diptych.engine.core.config import CacheOptions, SchedulerOptions
from diptych.engine.core.messages import (
    Abort,
    ApiDown,
    ApiUp,
    Closed,
    CommittedBlock,
    Join,
    Joined,
    PoolDown,
    PoolUp,
    Progress,
    Send,
    Submit,
    WorkerDown,
    WorkerUp,
)
from diptych.engine.core.types import DownCause, Epoch, LossCause, Role
from diptych.scheduler.audit import SchedulerAudit, take_audit
from diptych.scheduler.commands import PoolRead, ReadPool, SchedulerCommand, SchedulerInput
from diptych.scheduler.intake import Intake
from diptych.scheduler.lifecycle import HOLDING, RowState
from diptych.scheduler.members import Members, Pool, PoolPhase, Worker
from diptych.scheduler.outbox import Outbox
from diptych.scheduler.placement import Placer
from diptych.scheduler.queue import WaitingRoom
from diptych.scheduler.rows import Row, RowTable
from diptych.scheduler.runs import Runs
from diptych.scheduler.seating import Seating
from diptych.scheduler.steering import Steering
from diptych.scheduler.sums import take_stats

STATS_PERIOD_S: Final = 0.25


class Scheduler:
    def __init__(self, epoch: Epoch, options: SchedulerOptions, cache: CacheOptions) -> None:
        self.epoch = epoch
        self._members = Members(cache.block_size)
        self._rows = RowTable()
        self._outbox = Outbox(epoch, self._members)
        self._room = WaitingRoom(
            options.max_waiting, options.max_waiting_tokens, options.retry_after_max_s
        )
        self._placer = Placer(options.max_num_seqs, options.local_prefill_tokens)
        self._runs = Runs(
            options,
            cache,
            self._members,
            self._rows,
            self._outbox,
            on_drained=self._drained,
            wake=self._room.wake,
        )
        self._intake = Intake(
            cache, self._members, self._rows, self._room, self._runs, self._outbox
        )
        self._seating = Seating(
            cache,
            self._members,
            self._rows,
            self._room,
            self._runs,
            self._placer,
            self._outbox,
        )
        self._steering = Steering(
            options, cache, self._members, self._room, self._runs, self._placer, self._outbox
        )
        self._now = 0.0  # of this step
        self._ready = False
        self._membership_changed = False
        self._stats_due_at: float | None = None
        self._handlers: dict[type[SchedulerInput], Callable[[Any], None]] = {
            Submit: self._on_submit,
            Abort: self._on_abort,
            Closed: self._on_closed,
            Joined: self._on_joined,
            Progress: self._on_progress,
            WorkerUp: self._on_worker_up,
            WorkerDown: self._on_worker_down,
            PoolUp: self._on_pool_up,
            PoolDown: self._on_pool_down,
            PoolRead: self._on_pool_read,
            ApiUp: self._on_api_up,
            ApiDown: self._on_api_down,
        }

    def step(self, inputs: Sequence[SchedulerInput], now: float) -> list[SchedulerCommand]:
        """Handles the inputs in order, then places what can be placed. No inputs: the tick."""
        self._now = now
        for message in inputs:
            self._handlers[type(message)](message)
        self._members.sweep()
        self._steering.tick(now)
        self._seating.place_waiting()
        self._room.rate.tick(now, self._room.num_rows)
        self._publish_stats(now)
        return self._outbox.take()

    def audit(self) -> SchedulerAudit:
        return take_audit(self._members, self._rows, self._room, self._runs.counts.ignored_commits)

    def check_integrity(self) -> None:
        """Every block is where it should be, and every count is what it counts. Slow."""
        self._members.check_integrity()
        self._rows.check_integrity()
        self._room.check_integrity()
        queued = self._rows.counts[RowState.QUEUED]
        assert queued == self._room.num_rows, f"{queued} queued, {self._room.num_rows} wait"
        for pool in self._members.pools.values():
            pool.ledger.check_integrity()
        self._check_tables()

    # ---- API servers ---------------------------------------------------------------------------

    def _on_submit(self, message: Submit) -> None:
        if message.scheduler_epoch != self.epoch:
            return
        self._api_is_up(message.api, message.api_epoch)  # it may overtake its own ApiUp
        if self._members.is_api(message.api, message.api_epoch):
            self._intake.submit(message)

    def _on_abort(self, message: Abort) -> None:
        if message.scheduler_epoch == self.epoch:
            self._intake.abort(message)

    def _on_closed(self, message: Closed) -> None:
        if message.scheduler_epoch == self.epoch:
            self._intake.closed(message)

    def _on_api_up(self, message: ApiUp) -> None:
        self._api_is_up(message.api, message.api_epoch)

    def _api_is_up(self, api: int, epoch: Epoch) -> None:
        if self._members.api_up(api, epoch):
            self._intake.api_down(api)  # an older incarnation of it
            self._stats_due_at = None

    def _on_api_down(self, message: ApiDown) -> None:
        if self._members.api_down(message.api, message.api_epoch):
            self._intake.api_down(message.api)

    # ---- workers -------------------------------------------------------------------------------

    def _on_progress(self, message: Progress) -> None:
        worker = self._current(message.scheduler_epoch, message.worker, message.worker_epoch)
        pool = self._members.pools.get(worker.pool) if worker is not None else None
        if worker is None or not worker.joined or pool is None:
            return
        if message.steps:
            worker.steps += message.steps
            worker.step_s = message.compute_s / message.steps
            worker.decoded_tokens += message.decode_tokens
            worker.decode_tokens += message.decode_tokens
            worker.prefill_tokens += message.prefill_tokens
            known = worker.cost.known
            worker.cost.observe(
                message.steps, message.compute_s, message.prefill_tokens, message.decode_tokens
            )
            if worker.cost.known != known:
                self._members.learn(worker)
            worker.backlog_tokens = max(0, worker.backlog_tokens - message.prefill_tokens)
            counts = self._runs.counts
            counts.prefill_tokens += message.prefill_tokens
            counts.add_steps(message.step_sizes, message.prefill_tokens + message.decode_tokens)
        find, commit, me = self._rows.find, self._runs.commit, worker.id
        for block in message.committed:
            row = find(block.ref)
            if row is None or me not in row.holds:
                continue
            if row.source is None and row.sealed_on is None:  # nearly all
                commit(row, pool, block)
            else:
                self._committed(row, row.holds[me], pool, block)
        for landed in message.landed:
            row = find(landed.ref)
            if row is not None and (role := row.holds.get(worker.id)) is not None:
                self._runs.land(row, role, landed)
        for refused in message.refused:
            if self._members.refuse(worker, refused):
                self._runs.room_version += 1  # who waited for the pair may go elsewhere
        for ref in message.sealed:
            row = find(ref)
            if row is not None and row.holds.get(worker.id) is Role.PREFILL:
                self._runs.seal(row, worker)
        for ref in message.finished:
            row = find(ref)
            if row is not None and worker.id in row.holds:
                self._runs.finish(row, worker)
        for ref in message.released:
            row = find(ref)
            if row is not None and worker.id in row.holds:
                self._released(row, worker)
        for ref in message.starved:
            row = find(ref)
            if row is not None and worker.id in row.holds and row.state is RowState.RUNNING:
                self._runs.extend(row, self._members.pools[row.pool])

    def _committed(self, row: Row, role: Role, pool: Pool, block: CommittedBlock) -> None:
        source = row.source
        if source is not None and role is Role.PREFILL:
            self._runs.commit_source(row, source, block)
            return
        if role is Role.DECODE and (source is None or source.landed):
            self._runs.confirm_seal(row)  # before that it commits what it pulls
        self._runs.commit(row, pool, block)

    def _released(self, row: Row, worker: Worker) -> None:
        if row.state is RowState.RUNNING:  # unasked: it cannot go on there
            row.failed_pulls += 1
            self._runs.lose(row, worker, LossCause.WORKER)
        else:
            self._runs.let_go(row, worker)

    def _on_worker_up(self, message: WorkerUp) -> None:
        worker = self._members.workers.get(message.worker)
        if self._members.is_new_worker(message):
            if worker is not None:
                down = WorkerDown(worker.id, worker.epoch, DownCause.KILLED)
                self._on_worker_down(down)
            worker = self._members.worker_up(message, self._steering.dial_of(message))
            self._steering.came(worker, self._now)
            self._membership_changed = True
        elif worker is None or worker.epoch != message.worker_epoch or worker.joined:
            return
        self._outbox.to_worker(worker, Join(self.epoch, worker.epoch, worker.dial))

    def _on_joined(self, message: Joined) -> None:
        worker = self._current(message.scheduler_epoch, message.worker, message.worker_epoch)
        if worker is None or worker.joined:
            return
        worker.joined = True
        self._steering.joined(worker, self._now)
        self._membership_changed = True
        self._runs.room_version += 1
        self._read_when_quiet(self._members.pools.get(worker.pool))

    def _on_worker_down(self, message: WorkerDown) -> None:
        worker = self._members.worker(message.worker, message.worker_epoch)
        if worker is None:
            return
        is_fault = message.cause is DownCause.FAULT
        cause = LossCause.FAULT if is_fault else LossCause.WORKER
        for row in list(worker.assigned.values()):
            if is_fault:
                row.faults += 1
                row.poison = row.poison or row.alone
            self._runs.lose(row, worker, cause)
        for row in list(worker.sealed.values()):
            self._runs.lose_sealed(row)
        for row in list(worker.finished.values()):
            self._intake.doubt(row)
        self._members.worker_down(worker)
        self._steering.gone(worker)
        if self._placer.ward is worker:
            self._placer.ward = None
        self._membership_changed = True
        self._runs.room_version += 1
        self._read_when_quiet(self._members.pools.get(worker.pool))

    def _current(self, epoch: Epoch, worker: int, worker_epoch: Epoch) -> Worker | None:
        return self._members.worker(worker, worker_epoch) if epoch == self.epoch else None

    # ---- pools ---------------------------------------------------------------------------------

    def _on_pool_up(self, message: PoolUp) -> None:
        self._membership_changed = True
        self._read_when_quiet(self._members.pool_up(message))

    def _on_pool_down(self, message: PoolDown) -> None:
        pool = self._members.pools.get(message.pool)
        if pool is None or pool.phase is PoolPhase.GONE:
            return
        for worker in list(pool.workers.values()):  # announced before, unless that was lost
            self._on_worker_down(WorkerDown(worker.id, worker.epoch, DownCause.KILLED))
        self._members.pool_down(pool)
        self._membership_changed = True
        self._runs.room_version += 1

    def _read_when_quiet(self, pool: Pool | None) -> None:
        if pool is None or pool.phase is not PoolPhase.JOINING:
            return
        if self._members.is_quiet(pool):
            pool.phase = PoolPhase.READING
            self._outbox.add(ReadPool(pool.id))

    def _on_pool_read(self, message: PoolRead) -> None:
        pool = self._members.pools.get(message.pool)
        if pool is None or pool.phase is not PoolPhase.READING:
            return
        pool.ledger.adopt(message.generations, message.entries)
        pool.phase = PoolPhase.USABLE
        self._membership_changed = True
        self._runs.room_version += 1

    # ---- inside --------------------------------------------------------------------------------

    def _drained(self, row: Row) -> None:
        self._intake.drained(row)

    def _publish_stats(self, now: float) -> None:
        if self._membership_changed:
            self._membership_changed = False
            ready = self._members.is_ready() or self._steering.can_serve()
            if ready != self._ready:
                self._ready, self._stats_due_at = ready, None
        if self._stats_due_at is not None and now < self._stats_due_at:
            return
        self._stats_due_at = now + STATS_PERIOD_S
        stats = take_stats(
            self.epoch,
            self._members,
            self._rows,
            self._room,
            self._runs.counts,
            self._intake,
            self._steering,
            self._ready,
        )
        for address in self._members.apis.values():
            self._outbox.add(Send(address, stats))

    def _check_tables(self) -> None:
        uses: dict[tuple[int, int], int] = {}  # (pool, block) -> rows
        running = dict.fromkeys(self._members.pools, 0)
        for entry in self._rows.entries.values():
            for row in entry.rows.values():
                holds = row.state in HOLDING
                assert holds == bool(row.holds) == bool(row.table), f"{row.key}: {row.state}"
                if holds:
                    running[row.pool] += 1
                for worker in row.holds:
                    assert self._members.workers[worker].assigned[row.key] is row
                assert row.source is None or holds, f"{row.key} still has a source"
                source = [] if row.source is None else row.source.table
                held = [(row.pool, block) for block in row.table]
                for place in held + [(row.prefill_pool, block) for block in source]:
                    uses[place] = uses.get(place, 0) + 1
        for pool in self._members.pools.values():
            assert running[pool.id] == pool.num_running
            assert len(pool.hungry) <= pool.num_running - pool.num_draining
            for block in range(pool.ledger.num_blocks):
                count = uses.get((pool.id, block), 0)
                assert count == pool.ledger.uses(block), f"block {block}: {count} rows use it"
