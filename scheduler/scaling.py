"""Workers that are asked for and workers that leave: what autoscaling does about its wish.

Owns who leaves and what the supervisor was asked for. Invariants: a leaving worker is given
nothing; it is told to exit only when nothing depends on it; what it cannot finish in time is taken
back as a voluntary loss and runs elsewhere; while rows wait and nobody serves, a worker is on its
way.
"""

from diptych.engine.core.config import SchedulerOptions
from diptych.engine.core.messages import Address, ColdStart, Grow, Message, Retire, Send
from diptych.engine.core.types import WorkerId
from diptych.scheduler.autoscaler import Autoscaler
from diptych.scheduler.lifecycle import RowState
from diptych.scheduler.load import Load
from diptych.scheduler.members import Members, Worker
from diptych.scheduler.outbox import Outbox
from diptych.scheduler.placement import Placer
from diptych.scheduler.queue import WaitingRoom
from diptych.scheduler.runs import Runs

_SUPERVISOR = Address("supervisor", 0, 1)


class Scaling:
    def __init__(
        self,
        options: SchedulerOptions,
        members: Members,
        room: WaitingRoom,
        runs: Runs,
        placer: Placer,
        outbox: Outbox,
    ) -> None:
        assert options.autoscale is not None
        self.wanted: int | None = None  # None: not decided yet
        self.cold_start: ColdStart | None = None
        self.asked = 0  # how often more were wanted than there are
        self.retired = 0
        self._leave_s = options.leave_s
        self._members = members
        self._room = room
        self._runs = runs
        self._placer = placer
        self._outbox = outbox
        self._autoscaler = Autoscaler(options.autoscale, options.idle_s)
        self._leave_by: dict[WorkerId, float] = {}
        self._told = 0  # the most that the supervisor was asked for
        self._asked_at: float | None = None  # for one more than there are
        self._broken = False  # a worker ended by itself, and none joined since
        self._up_at: dict[WorkerId, float] = {}

    @property
    def asleep(self) -> bool:
        """Nobody serves, and that is how it should be until a row comes, or a worker that was
        asked for."""
        return self._nobody_serves() and not self._broken

    def _nobody_serves(self) -> bool:
        return not any(worker.serves for worker in self._members.workers.values())

    def hurry(self, now: float) -> None:
        """Every step: rows that wait for the first worker do not wait for the next look."""
        if self._room.num_rows and not self.wanted and self._nobody_serves():
            self._reach(1, now)

    def look(self, load: Load, now: float) -> None:
        """Once per period."""
        serving = [worker for worker in self._members.workers.values() if worker.serves]
        coming = max(self.wanted or 0, len(serving)) - len(serving)
        self._reach(self._autoscaler.decide(load, len(serving) + coming, coming, now), now)
        for worker in list(self._members.workers.values()):
            if worker.leaving:
                self._see_off(worker, now)

    def came(self, worker: Worker, now: float) -> None:
        """It announced itself."""
        self._up_at[worker.id] = now

    def joined(self, worker: Worker, now: float) -> None:
        """It takes rows from now: the end of a cold start, if it was asked for."""
        self._broken = False
        up_at = self._up_at.pop(worker.id, now)
        start, asked_at = worker.start, self._asked_at
        if asked_at is None or start is None:
            return
        self._asked_at = None
        stages = (start.import_s, start.weights_s, start.fork_s, start.ready_s, now - up_at)
        rest_s = max(0.0, now - asked_at - sum(stages))
        self.cold_start = ColdStart(worker.id, rest_s, *stages, now - asked_at)

    def gone(self, worker: Worker) -> None:
        self._broken = self._broken or not worker.retired
        self._leave_by.pop(worker.id, None)
        self._up_at.pop(worker.id, None)

    # ---- inside

    def _reach(self, wanted: int, now: float) -> None:
        """Takes back who was about to leave before anybody new is asked for."""
        self.wanted = wanted
        workers = self._members.workers.values()
        serving = [worker for worker in workers if worker.serves]
        leaving = [worker for worker in workers if worker.leaving and not worker.retired]
        while len(serving) < wanted and leaving:
            worker = leaving.pop()
            worker.leaving = False
            del self._leave_by[worker.id]
            serving.append(worker)
            self._runs.room_version += 1
        if len(serving) >= wanted:
            self._asked_at = None
        elif self._asked_at is None:
            self._asked_at = now
            self.asked += 1
        if len(serving) < wanted or wanted < self._told:  # again, or it is not waited for any more
            self._told = wanted
            self._tell(Grow(self._outbox.epoch, wanted))
        candidates = [worker for worker in serving if worker is not self._placer.ward]
        if len(serving) > wanted and candidates:
            worker = min(candidates, key=lambda w: (len(w.assigned), -w.id))
            worker.leaving = True
            self._leave_by[worker.id] = now + self._leave_s
            self._runs.room_version += 1

    def _see_off(self, worker: Worker, now: float) -> None:
        if worker.is_empty:
            self.retired += not worker.retired
            worker.retired = True
            self._told = wanted = self.wanted or 0
            self._tell(Retire(self._outbox.epoch, worker.id, worker.epoch, wanted))
        elif now >= self._leave_by[worker.id]:
            for row in list(worker.assigned.values()):
                if row.state is RowState.RUNNING:
                    self._runs.displace(row)

    def _tell(self, message: Message) -> None:
        self._outbox.add(Send(_SUPERVISOR, message))
