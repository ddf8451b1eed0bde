"""The shell of the product's own `Fleet`, which decides who is started, fenced and told.

Owns nothing but that. Invariants: `WorkerDown` leaves only after the exit was awaited; a new
scheduler hears of every worker that is not gone before it hears of a pool, so that it waits for all
of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Final

from diptych.engine.core.messages import Address, Grow, Message, PoolUp, Retire, Send
from diptych.engine.core.types import DownCause
from diptych.server.fleet import Fleet
from diptych.server.fleet_members import GiveUp, Kill, Rest, Start, Wake
from tests.sim.host import SUPERVISOR, Host
from tests.sim.hosts import Hosts
from tests.sim.world import Process, check

TICK_S: Final = 0.05


@dataclass(slots=True)
class Inbox(Process):
    """What is sent to the supervisor."""

    hear: Callable[[Message], None] = lambda message: None

    def receive(self, message: Message) -> None:
        self.hear(message)


class Supervisor:
    """Starts everything and keeps it running; it never dies (everything would end with it)."""

    def __init__(self, host: Host) -> None:
        self.host = host
        scenario = host.world.scenario
        home = [memory for pool, memory in host.memories.items() if pool not in scenario.places]
        self.fleet = Fleet(
            [spec for spec in scenario.workers if spec.pool not in scenario.places],
            num_apis=scenario.apis,
            external_api=False,
            pools=[PoolUp(memory.pool, memory.num_blocks, memory.block_size) for memory in home],
            hang_s=host.world.timing.hang_s,
            num_workers=len(scenario.workers),
            num_started=scenario.num_started,
        )
        self.hosts = Hosts(host, self.fleet)
        self.limits = scenario.scheduler.autoscale
        host.num_wanted = self._num_wanted
        host.world.processes[SUPERVISOR] = Inbox(host.world, SUPERVISOR, "v", hear=self._hear)
        host.world.on_death = self._on_death

    def start(self) -> None:
        self.fleet.model_ready()
        self.hosts.start()
        self._tick()

    def _tick(self) -> None:
        world = self.host.world
        running = (*self.host.workers.values(), *filter(None, [self.host.scheduler]))
        heard = [p for p in running if p.alive and self.hosts.hears_at(p.address) <= world.now]
        beats = {p.address: -1 if p.stuck else world.num_events for p in heard}
        self.fleet.beats(beats, world.now)
        self.fleet.tick(world.now)
        self._carry_out()
        world.at(TICK_S, self._tick)

    def _carry_out(self) -> None:
        for command in self.fleet.take():
            if isinstance(command, Send):
                self.host.tell(command.to, command.message)
            elif isinstance(command, Start):
                address = command.address
                self.host.later(
                    self.host.world.timing.restart_s,
                    lambda address=address: self._ready(address),  # type: ignore[misc]
                )
            elif isinstance(command, Kill):
                process = self.host.world.processes[command.address]
                self._between(process.address, lambda process=process: self._kill(process))  # type: ignore[misc]
            elif isinstance(command, Wake):
                self.host.later(self.host.world.timing.restart_s, self._awake)
            elif isinstance(command, Rest):
                check(not self.host.workers, "the weights go while workers run")
            else:
                assert isinstance(command, GiveUp), command
                check(False, "the fleet gives up: {}", command.reason)

    def _between(self, address: Address, action: Callable[[], None]) -> None:
        """An order to this process's host arrives there, or its answer here; or never."""
        world, at = self.host.world, self.hosts.hears_at(address)
        if at <= world.now:
            action()
        elif at < inf:
            world.at(at - world.now, lambda: self._between(address, action))

    def _kill(self, process: Process) -> None:
        process.cause = DownCause.HUNG
        world = self.host.world
        self.host.later(world.timing.detect_s, lambda: world.kill(process))

    def _awake(self) -> None:
        self.fleet.model_ready()

    def _num_wanted(self) -> int:
        return self.hosts.to_join + sum(member.wanted for member in self.fleet._workers)

    def _hear(self, message: Message) -> None:
        """From the scheduler: more workers, or one less."""
        now = self.host.world.now
        if isinstance(message, Grow):
            self.fleet.grow(message.scheduler_epoch, message.workers)
        else:
            assert isinstance(message, Retire), message
            address = Address("worker", message.worker, message.worker_epoch)
            self.fleet.retire(message.scheduler_epoch, address, now, message.wanted)
        check(self.limits is not None, "{} without autoscaling", message)
        if self.limits is not None:
            wanted = self._num_wanted()
            least = min(self.limits[0], self.host.world.scenario.num_started)
            check(least <= wanted <= self.limits[1], "{} workers are wanted", wanted)
        self._carry_out()

    def _ready(self, address: Address) -> None:
        self._between(address, lambda: self._announce(address))

    def _announce(self, address: Address) -> None:
        self.host.create(address)
        self.fleet.ready(address, self.host.world.now)
        self._carry_out()

    def _on_death(self, process: Process) -> None:
        gone = partial(self._between, process.address, lambda: self._exited(process))
        self.host.later(self.host.world.timing.detect_s, gone)

    def _exited(self, process: Process) -> None:
        self.host.forget(process)
        cause = DownCause.KILLED if process.cause is DownCause.HUNG else process.cause
        self.fleet.exited(process.address, cause, self.host.world.now)
        self._carry_out()
