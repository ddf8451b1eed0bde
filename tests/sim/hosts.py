"""Hosts beside the own one: they join, fall silent, are given up, and come back as new ones.

Owns which workers and which pool are on which host, and which host hears nobody. A loss takes all
of a host at once, and nobody reports it: the head only misses its word, gives it up and tells the
scheduler. What was there may be dead, or live on, cut off, until it is heard again. Invariant: a
host that comes back has new numbers and empty memory, as the product's heads give them.
"""

from dataclasses import dataclass
from math import inf
from typing import Final

from diptych.engine.core.config import WorkerSpec
from diptych.engine.core.messages import Address, PoolUp
from diptych.engine.core.types import PoolId, WorkerId
from diptych.server.fleet import Fleet
from tests.sim.host import Host
from tests.sim.memory import Memory
from tests.sim.scenario import SILENT_S, HostLoss
from tests.sim.worker import WorkerProcess

HOME: Final = 0
JOIN_S: Final = 0.2
"""Virtual seconds within which a host joins."""


@dataclass(slots=True)
class Away:
    """One host that joined. `opens_at`: nothing gets to it or from it before."""

    number: int
    place: int  # of the scenario: a host that comes back is another one in the same place
    pool: PoolId
    workers: list[WorkerSpec]
    opens_at: float = 0.0
    given_up: bool = False


class Hosts:
    """`carry_out` does what the fleet wants after it heard of a host."""

    def __init__(self, host: Host, fleet: Fleet) -> None:
        self.host = host
        self.world = host.world
        self.fleet = fleet
        self.joined = 0
        self.to_join = 0  # there, but not in the fleet yet
        self._of_worker: dict[WorkerId, Away] = {}
        self._of_pool: dict[PoolId, Away] = {}
        self._in_place: dict[int, Away | None] = {}
        self._next_worker = len(self.world.scenario.workers)
        self._next_pool = self.world.scenario.pools
        self.world.opens_at = self.opens_at
        host.opens_at = lambda pool: self._opens_at(self._of_pool.get(pool))

    # ---- who hears whom ------------------------------------------------------------------------

    def opens_at(self, source: Address, to: Address) -> float:
        """When a message from one to the other gets through; never: infinity."""
        one, other = self._of(source), self._of(to)
        return 0.0 if one is other else max(self._opens_at(one), self._opens_at(other))

    def living_pools(self) -> set[PoolId]:
        lost = {pool for pool, away in self._of_pool.items() if away.given_up}
        return self.host.memories.keys() - lost

    def hears_at(self, address: Address) -> float:
        """When the head hears of this process, and this process's host of the head."""
        away = self._of(address)
        return inf if away is not None and away.given_up else self._opens_at(away)

    def _of(self, address: Address) -> Away | None:
        return self._of_worker.get(address.number) if address.kind == "worker" else None

    def _opens_at(self, away: Away | None) -> float:
        return 0.0 if away is None else away.opens_at

    # ---- a host's life -------------------------------------------------------------------------

    def start(self) -> None:
        scenario = self.world.scenario
        for place in scenario.places:
            workers = [spec for spec in scenario.workers if spec.pool == place]
            self._later_joins(Away(0, place, place, workers))
        for loss in scenario.losses:
            self.world.at(loss.at, lambda loss=loss: self._lose(loss))  # type: ignore[misc]

    def _later_joins(self, away: Away) -> None:
        self.to_join += len(away.workers)
        self.host.later(JOIN_S, lambda: self._join(away))

    def _join(self, away: Away) -> None:
        self.joined += 1
        away.number = HOME + self.joined
        self.to_join -= len(away.workers)
        self._in_place[away.place] = self._of_pool[away.pool] = away
        self._of_worker |= dict.fromkeys([spec.worker for spec in away.workers], away)
        memory = self.host.memories[away.pool]
        pool = PoolUp(away.pool, memory.num_blocks, memory.block_size)
        self.world.note(f"host {away.number} joins", away)
        self.fleet.join(away.number, away.workers, [pool])
        self.fleet.model_ready(away.number)

    def _lose(self, loss: HostLoss) -> None:
        away = self._in_place.get(loss.place)
        if away is None:
            return
        world = self.world
        world.note(f"host {away.number} is lost", loss)
        world.last_fault = max(world.last_fault, world.now)
        away.opens_at = inf if loss.dies else world.now + loss.silent_s
        if loss.dies:
            for process in self._processes(away):
                world.kill(process)
        if away.opens_at < inf:
            world.at(loss.silent_s, lambda: self._heard_again(away))
        if loss.dies or loss.silent_s > SILENT_S:
            self._in_place[loss.place] = None
            world.at(SILENT_S, lambda: self._give_up(away, loss))

    def _give_up(self, away: Away, loss: HostLoss) -> None:
        """The head has heard nothing for too long."""
        world = self.world
        world.note(f"host {away.number} is given up")
        world.last_fault = world.now
        away.given_up = True
        for process in self._processes(away):
            self.host.forget(process)
        self.host.watch.lost |= {spec.worker for spec in away.workers}
        self.fleet.leave(away.number)
        if loss.back_s is not None:
            world.last_fault = world.now + loss.back_s
            world.at(loss.back_s, lambda: self._come_back(away))

    def _heard_again(self, away: Away) -> None:
        """What waited on its way arrives, or its connection turns out to be broken."""
        self.world.last_fault = self.world.now
        if not away.given_up:
            return
        for (source, to), link in self.world.links.items():
            if (self._of(source) is away) != (self._of(to) is away):
                link.broken = link.rng.random() < 0.5
        self.host.later(1.0, lambda: self._end(away))  # its agent hears that it was given up

    def _end(self, away: Away) -> None:
        for process in list(self.world.processes.values()):
            if self._of(process.address) is away:
                self.world.kill(process)

    def _come_back(self, away: Away) -> None:
        """The same machine, as a new host."""
        pool, self._next_pool = self._next_pool, self._next_pool + 1
        first, self._next_worker = self._next_worker, self._next_worker + len(away.workers)
        workers = [WorkerSpec(first + i, pool, spec.dial) for i, spec in enumerate(away.workers)]
        scenario = self.world.scenario
        self.host.add(Memory(pool, scenario.num_blocks, scenario.block_size), workers)
        self._later_joins(Away(0, away.place, pool, workers))

    def _processes(self, away: Away) -> list[WorkerProcess]:
        mine = {spec.worker for spec in away.workers}
        return [self.host.workers[number] for number in sorted(mine & self.host.workers.keys())]
