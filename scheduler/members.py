"""Who takes part: API servers, workers with their epochs, pools; and when a pool may be used.

Owns membership and the handshake that makes a pool usable: every known worker of it has joined this
scheduler's epoch, so that no sequence of an older one touches a block; then its control page is
read; then blocks are given out. Invariant: a message that names an older epoch of its sender finds
nobody here. The supervisor announces all living workers of a pool before the pool itself.
"""

from dataclasses import dataclass, field
from enum import Enum, auto

from diptych.engine.core.errors import ConfigError
from diptych.engine.core.messages import Address, Grant, PoolUp, Refused, StartTimes, WorkerUp
from diptych.engine.core.types import ApiId, BlockHash, Epoch, PoolId, WorkerId
from diptych.scheduler.cost_model import PairCost, WorkerCost
from diptych.scheduler.ledger import PoolLedger
from diptych.scheduler.queue import RankHeap
from diptych.scheduler.rows import Row, RowKey


class PoolPhase(Enum):
    JOINING = auto()  # workers may still touch blocks for an older scheduler
    READING = auto()  # the shell reads the control page
    USABLE = auto()
    GONE = auto()  # its host is lost; rows may hold its blocks until their other side let go


@dataclass(slots=True, eq=False)
class Worker:
    """One incarnation of one worker."""

    id: WorkerId
    epoch: Epoch
    pool: PoolId
    dial: int
    address: Address
    joined: bool = False
    assigned: dict[RowKey, Row] = field(default_factory=dict)  # may touch blocks of these
    finished: dict[RowKey, Row] = field(default_factory=dict)  # ended here, not closed yet
    sealed: dict[RowKey, Row] = field(default_factory=dict)  # its seal may not have arrived
    cost: WorkerCost = field(default_factory=WorkerCost)
    grants: list[Grant] = field(default_factory=list)  # of this step, not sent yet
    backlog_tokens: int = 0  # assigned for prefill and not reported as computed
    steps: int = 0
    step_s: float = 0.0  # mean of the last report
    decoded_tokens: int = 0  # since the load was last measured, like the next two
    placed_tokens: int = 0  # prompt tokens to be computed, of rows given to it
    placed_squares: int = 0  # sum of the squares of the same
    decode_tokens: int = 0  # since it started
    prefill_tokens: int = 0  # since it started
    leaving: bool = False  # is given nothing new
    retired: bool = False  # the supervisor was told to end it
    start: StartTimes | None = None

    @property
    def serves(self) -> bool:
        """It may be given new rows."""
        return self.joined and not self.leaving

    @property
    def is_empty(self) -> bool:
        """Nothing depends on it any more."""
        return not (self.assigned or self.finished or self.sealed)

    def expect_prefill(self, tokens: int) -> None:
        """A row given to it has so many prompt tokens to compute here."""
        self.backlog_tokens += tokens
        self.placed_tokens += tokens
        self.placed_squares += tokens * tokens


@dataclass(slots=True, frozen=True)
class Refusal:
    """Two pools that do not go together, as two workers found; void once one of these is gone."""

    reason: str
    workers: tuple[Worker, Worker]


@dataclass(slots=True, eq=False)
class Pool:
    id: PoolId
    ledger: PoolLedger
    phase: PoolPhase = PoolPhase.JOINING
    workers: dict[WorkerId, Worker] = field(default_factory=dict)  # living ones
    computing: dict[BlockHash, Row] = field(default_factory=dict)  # block -> who computes it
    waiters: dict[BlockHash, list[Row]] = field(default_factory=dict)  # rows held for a block
    hungry: RankHeap = field(default_factory=RankHeap)  # want blocks
    victims: RankHeap = field(default_factory=RankHeap)  # may be preempted, newest first
    num_running: int = 0  # rows that hold blocks
    num_draining: int = 0  # of these, rows that will give all of them back soon
    decodes: bool = False  # a worker of it decodes, or will again once it was started again

    @property
    def is_idle(self) -> bool:
        """No row runs in it, reads from it or waits for it."""
        return not (self.num_running or self.ledger.num_used or self.computing or self.waiters)


class Members:
    """The living. Workers are found by id only through `worker`, which checks the epoch."""

    def __init__(self, block_size: int) -> None:
        self.workers: dict[WorkerId, Worker] = {}
        self.pools: dict[PoolId, Pool] = {}
        self.apis: dict[ApiId, Address] = {}
        self.apart = False  # there is, or was, more than one pool: a decode worker may be alone
        self._pair_costs: dict[tuple[PoolId, PoolId], PairCost] = {}
        self._refusals: dict[tuple[PoolId, PoolId], Refusal] = {}  # lower pool first
        self._block_size = block_size
        self._orphans: dict[WorkerId, Worker] = {}  # up before their pool
        self._worker_epochs: dict[WorkerId, Epoch] = {}  # newest seen
        self._api_epochs: dict[ApiId, Epoch] = {}  # newest seen

    def api_up(self, api: ApiId, epoch: Epoch) -> bool:
        """True: this incarnation is new (its predecessor, if any, is gone)."""
        if epoch <= self._api_epochs.get(api, -1):
            return False
        self._api_epochs[api] = epoch
        self.apis[api] = Address("api", api, epoch)
        return True

    def api_down(self, api: ApiId, epoch: Epoch) -> bool:
        """True: it lived until now. Its epoch is never taken for a living one again."""
        newest = self._api_epochs.get(api, -1)
        self._api_epochs[api] = max(newest, epoch)
        if epoch < newest:
            return False
        return self.apis.pop(api, None) is not None

    def is_api(self, api: ApiId, epoch: Epoch) -> bool:
        address = self.apis.get(api)
        return address is not None and address.epoch == epoch

    def is_new_worker(self, message: WorkerUp) -> bool:
        return message.worker_epoch > self._worker_epochs.get(message.worker, -1)

    def worker_up(self, message: WorkerUp, dial: int | None = None) -> Worker:
        """`dial`: with which it begins, if not the one that it was started with."""
        assert self.is_new_worker(message)
        assert message.worker not in self.workers
        self._worker_epochs[message.worker] = message.worker_epoch
        address = Address("worker", message.worker, message.worker_epoch)
        first = message.dial if dial is None else dial
        worker = Worker(message.worker, message.worker_epoch, message.pool, first, address)
        worker.start = message.start
        for other in self.workers.values():
            worker.cost.guess_like(other.cost)
        self.workers[worker.id] = worker
        pool = self.pools.get(message.pool)
        if pool is None:
            self._orphans[worker.id] = worker
        else:
            _house(pool, worker)
        return worker

    def learn(self, worker: Worker) -> None:
        """It showed a cost for the first time: those that have not are guessed to be like it."""
        for other in self.workers.values():
            if other is not worker:
                other.cost.guess_like(worker.cost)

    def worker(self, worker: WorkerId, epoch: Epoch) -> Worker | None:
        found = self.workers.get(worker)
        return found if found is not None and found.epoch == epoch else None

    def worker_down(self, worker: Worker) -> None:
        del self.workers[worker.id]
        for pair, refusal in list(self._refusals.items()):
            if worker in refusal.workers:  # what comes in its place may do better
                del self._refusals[pair]
        self._orphans.pop(worker.id, None)
        pool = self.pools.get(worker.pool)
        if pool is not None:
            pool.workers.pop(worker.id, None)

    def pool_up(self, message: PoolUp) -> Pool | None:
        """The new pool; None if it is known already."""
        if message.pool in self.pools:
            return None
        if message.block_size != self._block_size:
            raise ConfigError(
                f"pool {message.pool} has blocks of {message.block_size} tokens,"
                f" the scheduler was configured for {self._block_size}"
            )
        pool = self.pools[message.pool] = Pool(message.pool, PoolLedger(message.num_blocks))
        self.apart = self.apart or message.apart or len(self.pools) > 1
        for worker in [w for w in self._orphans.values() if w.pool == pool.id]:
            _house(pool, self._orphans.pop(worker.id))
        return pool

    def pool_down(self, pool: Pool) -> None:
        """It takes no more rows; forgotten by `sweep`."""
        assert not pool.workers, "workers are announced down before their pool"
        pool.phase = PoolPhase.GONE

    def living_pools(self) -> list[Pool]:
        return [pool for pool in self.pools.values() if pool.phase is not PoolPhase.GONE]

    def sweep(self) -> None:
        """Forgets lost pools that no row refers to any more."""
        for pool in list(self.pools.values()):
            if pool.phase is PoolPhase.GONE and pool.is_idle:
                del self.pools[pool.id]
                for pair in [pair for pair in self._pair_costs if pool.id in pair]:
                    del self._pair_costs[pair]

    def pair_cost(self, source: PoolId, own: PoolId) -> PairCost:
        """What it costs to move blocks from one pool to another."""
        key = (source, own)
        if key not in self._pair_costs:
            self._pair_costs[key] = PairCost()
        return self._pair_costs[key]

    def refuse(self, reader: Worker, refused: Refused) -> bool:
        """A pair of pools is not used again while these two workers live. True: that is new."""
        peer = self.worker(*refused.peer)
        if peer is None or peer.pool != refused.pool or self.refusal(peer.pool, reader.pool):
            return False
        self._refusals[_pair(peer.pool, reader.pool)] = Refusal(refused.reason, (reader, peer))
        return True

    def refusal(self, one: PoolId, other: PoolId) -> str | None:
        """Why no block moves between these pools, either way."""
        found = self._refusals.get(_pair(one, other))
        return None if found is None else found.reason

    def must_stand_in(self) -> bool:
        """The hosts of all that decode are lost: whoever is left does everything."""
        return self.apart and not any(pool.decodes for pool in self.living_pools())

    def pairs(self) -> list[tuple[PoolId, PoolId, PairCost]]:
        """(source, own pool, cost) of all that ever were compared."""
        return [(*pair, cost) for pair, cost in sorted(self._pair_costs.items())]

    def largest_pool(self) -> int | None:
        """Blocks; None while that may change, so that nothing is refused too early. A pool whose
        workers are all away is read when one comes, but its size is known."""
        pools = self.living_pools()
        if any(pool.workers and pool.phase is not PoolPhase.USABLE for pool in pools):
            return None
        if not any(pool.phase is PoolPhase.USABLE for pool in pools):
            return None
        return max(pool.ledger.num_blocks for pool in pools)

    def is_quiet(self, pool: Pool) -> bool:
        """No worker of it can touch a block for an older scheduler."""
        workers = pool.workers.values()
        return bool(workers) and all(worker.joined for worker in workers)

    def is_ready(self) -> bool:
        """Somebody can decode, and prefill if need be, in pools that are read."""
        usable = [pool for pool in self.pools.values() if pool.phase is PoolPhase.USABLE]
        dials = [w.dial for pool in usable for w in pool.workers.values() if w.serves]
        can_prefill = self.apart or any(dial > 0 for dial in dials)
        return can_prefill and any(dial < 100 or self.must_stand_in() for dial in dials)

    def check_integrity(self) -> None:
        for worker in self.workers.values():
            pool = self.pools.get(worker.pool)
            home = self._orphans if pool is None else pool.workers
            assert home[worker.id] is worker, f"worker {worker.id} is in no pool"
            assert worker.backlog_tokens >= 0
            for row in worker.assigned.values():
                assert worker.id in row.holds, f"{row.key} does not know worker {worker.id}"
            for row in worker.sealed.values():
                assert row.sealed_on == worker.id, f"{row.key} was not sealed by {worker.id}"


def _pair(one: PoolId, other: PoolId) -> tuple[PoolId, PoolId]:
    return min(one, other), max(one, other)


def _house(pool: Pool, worker: Worker) -> None:
    pool.workers[worker.id] = worker
    pool.decodes = pool.decodes or worker.dial < 100
