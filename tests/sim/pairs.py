"""Pools that do not go together, followed from what workers report and what the scheduler says.

Owns the refusals that one scheduler heard of. Invariant that it checks: as long as the two workers
live that found a pair of pools unfit, no sequence is to read one of them into the other.
"""

from dataclasses import dataclass, field

from diptych.engine.core.messages import Assign, Message, Progress, WorkerDown
from diptych.engine.core.types import Epoch, PoolId, WorkerId
from tests.sim.world import check

Incarnation = tuple[WorkerId, Epoch]


@dataclass(slots=True)
class Pairs:
    """Of one scheduler incarnation."""

    epoch: Epoch
    pool_of: dict[WorkerId, PoolId]
    gone: set[Incarnation] = field(default_factory=set)
    found: dict[frozenset[PoolId], set[Incarnation]] = field(default_factory=dict)

    def hears(self, message: Message) -> None:
        if isinstance(message, WorkerDown):
            self.gone.add((message.worker, message.worker_epoch))
        elif isinstance(message, Progress) and message.scheduler_epoch == self.epoch:
            for refused in message.refused:
                pair = frozenset((refused.pool, self.pool_of[message.worker]))
                both = {(message.worker, message.worker_epoch), refused.peer}
                if not both & self.gone and not self._holds(pair):
                    self.found[pair] = both

    def says(self, worker: WorkerId, message: Message) -> None:
        if not isinstance(message, Assign):
            return
        for handoff in (message.handoff, message.prefix):
            if handoff is not None:
                pair = frozenset((handoff.pool, self.pool_of[worker]))
                check(not self._holds(pair), "{}: pools {} do not go together", message.ref, pair)

    def _holds(self, pair: frozenset[PoolId]) -> bool:
        return pair in self.found and not self.found[pair] & self.gone
