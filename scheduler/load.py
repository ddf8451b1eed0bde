"""How near the cluster is to missing its targets: measured once a second, as plain numbers.

Owns nothing. A pressure of 1 means that a request which arrives now is expected to just meet its
target. Invariant: without prefill work there is no pressure on it, and likewise for decode; a side
that has work and no worker is under infinite pressure.
"""

from dataclasses import dataclass
from math import inf
from typing import Final

from diptych.scheduler.members import Members, Pool, PoolPhase, Worker
from diptych.scheduler.queue import WaitingRoom

NO_ROOM: Final = 1.25
"""Pressure on decode while rows wait that only lack its blocks or seats."""


@dataclass(slots=True, frozen=True)
class Load:
    """`prefill` and `decode` are pressures, the capacities count whole workers."""

    prefill: float
    decode: float
    prefill_capacity: float  # sum of dials / 100
    decode_capacity: float
    num_rows: int  # on workers or waiting
    lacks_room: bool = False  # what waits only lacks blocks or seats to decode

    @property
    def worst(self) -> float:
        return max(self.prefill, self.decode)

    def after(self, prefill_more: float, decode_more: float) -> float:
        """The worst pressure once the capacities have changed and work has spread."""
        return max(
            _scaled(self.prefill, self.prefill_capacity, prefill_more),
            _scaled(self.decode, self.decode_capacity, decode_more),
        )


def _scaled(pressure: float, capacity: float, more: float) -> float:
    if pressure <= 0.0:
        return 0.0
    if capacity + more <= 0.0:
        return inf
    if pressure == inf:
        return 2.0  # nobody worked on it: any capacity is better
    return pressure * capacity / (capacity + more)


def measure(
    members: Members, room: WaitingRoom, sequences_max: int, slo_s: tuple[float, float]
) -> Load:
    """Of the workers that take new rows, since the last call."""
    workers = [worker for worker in members.workers.values() if worker.serves]
    backlogs = [worker.backlog_tokens for worker in members.workers.values()]
    waiting = room.num_tokens
    lacks_room = room.num_rows > 0 and not _decode_room(members, sequences_max)
    prefill_s = _prefill_s(workers, 0 if lacks_room else waiting)
    if prefill_s is None:
        prefill_s = inf if any(backlogs) or waiting else 0.0
    step_s = [worker.cost.step_s for worker in workers if worker.decoded_tokens > 0]
    decode = max(step_s, default=0.0) / slo_s[1]
    if lacks_room:
        decode = max(decode, NO_ROOM)
    num_rows = room.num_rows + sum(len(worker.assigned) for worker in members.workers.values())
    prefill_capacity = sum(worker.dial for worker in workers) / 100.0
    decode_capacity = len(workers) - prefill_capacity
    if num_rows and decode_capacity <= 0.0:
        decode = inf
    return Load(
        prefill_s / slo_s[0], decode, prefill_capacity, decode_capacity, num_rows, lacks_room
    )


def _prefill_s(workers: list[Worker], waiting_tokens: int) -> float | None:
    """How long the queue is for a prompt that arrives now; None: nobody prefills."""
    rates = [worker.dial / 100.0 / worker.cost.prefill_s for worker in workers if worker.dial > 0]
    if not rates:
        return None
    queues_s = [
        worker.backlog_tokens * worker.cost.prefill_s * 100.0 / worker.dial
        for worker in workers
        if worker.dial > 0
    ]
    return min(queues_s) + waiting_tokens / sum(rates)


def _decode_room(members: Members, sequences_max: int) -> bool:
    """Whether the row at the queue's head would find blocks and a seat where rows decode."""
    return any(
        _has_blocks(pool) and any(_has_seat(worker, sequences_max) for worker in _decoders(pool))
        for pool in members.pools.values()
        if pool.phase is PoolPhase.USABLE
    )


def _decoders(pool: Pool) -> list[Worker]:
    return [worker for worker in pool.workers.values() if worker.serves and worker.dial < 100]


def _has_seat(worker: Worker, sequences_max: int) -> bool:
    return len(worker.assigned) < sequences_max


def _has_blocks(pool: Pool) -> bool:
    return not pool.hungry and pool.ledger.num_available * 8 >= pool.ledger.num_blocks
