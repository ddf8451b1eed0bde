"""What the scheduler changes about the workers themselves: their dials, and how many there are.

Owns when it looks (every `steer_s`) and the dials of workers over their restarts. Invariants: a
worker is told every change of its dial, by `SetDial` or with its `Join`; without targets
no role changes, but for a lost one where workers may leave; prompts that wait on a worker which
turns to decoding are placed again where that is sooner.
"""

from diptych.engine.core.config import CacheOptions, SchedulerOptions
from diptych.engine.core.messages import SetDial, WorkerUp
from diptych.engine.core.types import WorkerId
from diptych.scheduler.demand import DemandMeter, costs_of
from diptych.scheduler.dials import DialController, Move, covers, repair
from diptych.scheduler.load import Load, measure
from diptych.scheduler.members import Members, PoolPhase, Worker
from diptych.scheduler.moving import better_elsewhere
from diptych.scheduler.outbox import Outbox
from diptych.scheduler.placement import Placer
from diptych.scheduler.queue import WaitingRoom
from diptych.scheduler.runs import Runs
from diptych.scheduler.scaling import Scaling


class Steering:
    def __init__(
        self,
        options: SchedulerOptions,
        cache: CacheOptions,
        members: Members,
        room: WaitingRoom,
        runs: Runs,
        placer: Placer,
        outbox: Outbox,
    ) -> None:
        self.moves = 0  # since start
        self.load: Load | None = None  # of the last look
        self._options = options
        self._cache = cache
        self._members = members
        self._room = room
        self._runs = runs
        self._placer = placer
        self._outbox = outbox
        self._meter = DemandMeter()
        self._dials = DialController(options.slo_s, options.max_num_seqs)
        self._remembered: dict[WorkerId, int] = {}
        self._lent: dict[WorkerId, int] = {}  # repaired: the dial it had before
        self._recheck = False  # somebody came or left: a role may have no worker
        self._due_at: float | None = None
        self._looked_at: float | None = None
        self._active = options.steers or options.autoscale is not None
        self.scaling = (
            Scaling(options, members, room, runs, placer, outbox)
            if options.autoscale is not None
            else None
        )

    def dial_of(self, message: WorkerUp) -> int:
        """What a worker starts with: the dial that its last incarnation had."""
        return self._remembered.get(message.worker, message.dial)

    def came(self, worker: Worker, now: float) -> None:
        """It announced itself."""
        if self.scaling is not None:
            self.scaling.came(worker, now)

    def joined(self, worker: Worker, now: float) -> None:
        """It takes rows: who stood in for a lost role may go back to his own."""
        if self.scaling is not None:
            self.scaling.joined(worker, now)
        self._recheck = True

    def gone(self, worker: Worker) -> None:
        if self.scaling is not None:
            self.scaling.gone(worker)
        self._recheck = True

    def tick(self, now: float) -> None:
        """At the end of every step's inputs."""
        if not self._active:
            return
        if self.scaling is not None:
            self.scaling.hurry(now)
        if self._due_at is None or now >= self._due_at:
            self._due_at = now + self._options.steer_s
            self._look(now)
        if self._recheck and self._has_rows():
            self._recheck = False
            self._give_back()
            self._repair()

    def can_serve(self) -> bool:
        """Whatever comes next is served: the roles that it needs are taken, or somebody comes."""
        if self.scaling is not None and self.scaling.asleep:
            return True
        return self._active and any(
            pool.phase is PoolPhase.USABLE and any(w.serves for w in pool.workers.values())
            for pool in self._members.pools.values()
        )

    def _look(self, now: float) -> None:
        options = self._options
        self.load = measure(self._members, self._room, options.max_num_seqs, options.slo_s)
        elapsed_s = options.steer_s if self._looked_at is None else now - self._looked_at
        self._looked_at = now
        scenarios = self._meter.look(
            self._members, self._room, self._runs.counts, elapsed_s, self.load.lacks_room
        )
        if options.steers:
            workers = self._serving()
            costs, turned = costs_of(workers), self._meter.turned
            self._apply(self._dials.decide(workers, scenarios, costs, turned))
        self._move_prompts()
        if self.scaling is not None:
            self.scaling.look(self.load, now)
            self._recheck = True  # somebody may leave, or stay after all

    def _move_prompts(self) -> None:
        """Those that would crawl on a worker that decodes only now."""
        serving = self._serving()
        for worker in serving:
            if worker.dial <= 0 and worker.backlog_tokens:
                others = [other for other in serving if other is not worker]
                for row in better_elsewhere(worker, others, self._cache):
                    row.moves += 1
                    self._runs.displace(row)

    def _give_back(self) -> None:
        workers = self._serving()
        for worker in workers:
            dial = self._lent.get(worker.id)
            others = [other.dial for other in workers if other is not worker]
            if dial is not None and covers([*others, dial]):
                del self._lent[worker.id]
                self._apply([Move(worker, dial)])

    def _repair(self) -> None:
        """There is work: if a role has no worker, somebody does both from now."""
        moves = repair(self._serving())
        for move in moves:
            self._lent[move.worker.id] = move.worker.dial
        self._apply(moves)

    def _has_rows(self) -> bool:
        if self._room.num_rows:
            return True
        return any(worker.assigned for worker in self._members.workers.values())

    def _serving(self) -> list[Worker]:
        workers = self._members.workers.values()
        return [worker for worker in workers if worker.serves and worker is not self._placer.ward]

    def _apply(self, moves: list[Move]) -> None:
        for move in moves:
            worker, dial = move.worker, move.dial
            assert 0 <= dial <= 100
            worker.dial = self._remembered[worker.id] = dial
            self.moves += 1
            self._runs.room_version += 1
            self._outbox.to_worker(worker, SetDial(self._outbox.epoch, worker.epoch, dial))
