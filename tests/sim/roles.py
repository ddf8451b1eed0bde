"""Who prefills and who decodes, followed from outside: from what the scheduler hears and says.

Owns the dial that each living worker was told last, and who leaves. Invariants that it checks: a
dial is 0..100, and a worker that comes back has the one it had; where workers move, somebody
prefills and somebody decodes as long as there is anything to do.
"""

from dataclasses import dataclass, field

from diptych.engine.core.messages import (
    Address,
    Assign,
    Join,
    Joined,
    Message,
    Retire,
    SetDial,
    WorkerDown,
)
from diptych.engine.core.types import Epoch, WorkerId
from tests.sim.world import check


@dataclass(slots=True)
class Roles:
    """Of one scheduler incarnation."""

    epoch: Epoch
    steers: bool
    told: dict[WorkerId, tuple[Epoch, int]] = field(default_factory=dict)  # (worker epoch, dial)
    joined: set[WorkerId] = field(default_factory=set)
    retired: set[tuple[WorkerId, Epoch]] = field(default_factory=set)
    last: dict[WorkerId, int] = field(default_factory=dict)  # dial, of the dead ones too
    moved_at: dict[WorkerId, float] = field(default_factory=dict)

    def hears(self, message: Message) -> None:
        if isinstance(message, Joined) and message.scheduler_epoch == self.epoch:
            known = self.told.get(message.worker)
            if known is not None and known[0] == message.worker_epoch:
                self.joined.add(message.worker)
        elif isinstance(message, WorkerDown):
            known = self.told.get(message.worker)
            if known is not None and known[0] == message.worker_epoch:
                del self.told[message.worker]
                self.joined.discard(message.worker)

    def says(self, to: Address, message: Message, now: float) -> None:
        if isinstance(message, Join):
            if self.told.get(to.number, (0, 0))[0] != to.epoch:
                self.joined.discard(to.number)
            last = self.last.setdefault(to.number, message.dial)
            check(message.dial == last, "worker {} had dial {}, not {}", to.number, last, message)
            self.told[to.number] = (to.epoch, message.dial)
        elif isinstance(message, SetDial):
            check(self.steers, "worker {} moves, though nothing may", to.number)
            known = self.told.get(to.number)
            check(known is not None and known[0] == to.epoch, "worker {} is not there", to.number)
            check(0 <= message.dial <= 100, "worker {} gets dial {}", to.number, message.dial)
            self.told[to.number] = (to.epoch, message.dial)
            self.last[to.number] = message.dial
            self.moved_at[to.number] = now
        elif isinstance(message, Retire):
            check(message.worker in self.told, "worker {} is not there", message.worker)
            self.retired.add((message.worker, message.worker_epoch))
        elif isinstance(message, Assign):
            check((to.number, to.epoch) not in self.retired, "{} goes to one who left", message.ref)

    def check_cover(self, num_rows: int, serving: set[WorkerId]) -> None:
        """After a step of the scheduler. `serving`: who is given new rows."""
        check(serving <= self.joined, "{} serve, but {} joined", serving, self.joined)
        dials = [self.told[worker][1] for worker in serving]
        if self.steers and num_rows and dials:
            check(max(dials) > 0, "nobody prefills: {}", dials)
            check(min(dials) < 100, "nobody decodes: {}", dials)
