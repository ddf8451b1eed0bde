"""Two supervisors: the product's own `Fleet` for hosts with one pool, and a model for several.

Own who is started, fenced and told. Invariants of both: `WorkerDown` leaves only after the exit was
awaited; a new scheduler hears of every worker that is not gone before it hears of the pool, so that
it waits for all of them.
"""

from typing import Final, Protocol

from diptych.engine.core.messages import (
    Address,
    ApiDown,
    ApiUp,
    Message,
    PoolUp,
    SchedulerDown,
    SchedulerUp,
    Send,
    WorkerDown,
    WorkerUp,
)
from diptych.engine.core.types import DownCause
from diptych.server.fleet import Fleet, Kill, Start
from tests.sim.host import Host
from tests.sim.world import Process, check

TICK_S: Final = 0.05


class Supervisor(Protocol):
    """Starts everything and keeps it running; it never dies (everything would end with it)."""

    host: Host

    def start(self) -> None: ...


def make_supervisor(host: Host) -> Supervisor:
    return FleetSupervisor(host) if len(host.memories) == 1 else ModelSupervisor(host)


class FleetSupervisor:
    """The shell of the real `Fleet`."""

    def __init__(self, host: Host) -> None:
        self.host = host
        scenario = host.world.scenario
        memory = host.memories[0]
        self.fleet = Fleet(
            list(scenario.workers),
            num_apis=scenario.apis,
            external_api=False,
            pool=PoolUp(0, memory.num_blocks, memory.block_size),
            hang_s=host.world.timing.hang_s,
        )
        host.world.on_death = self._on_death

    def start(self) -> None:
        self.fleet.model_ready()
        self._tick()

    def _tick(self) -> None:
        world = self.host.world
        running = (*self.host.workers.values(), *filter(None, [self.host.scheduler]))
        beats = {p.address: -1 if p.stuck else world.num_events for p in running if p.alive}
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
                process.cause = DownCause.HUNG
                self.host.later(
                    self.host.world.timing.detect_s,
                    lambda process=process: self.host.world.kill(process),  # type: ignore[misc]
                )
            else:
                check(False, "the fleet gives up: {}", command.reason)

    def _ready(self, address: Address) -> None:
        self.host.create(address)
        self.fleet.ready(address, self.host.world.now)
        self._carry_out()

    def _on_death(self, process: Process) -> None:
        self.host.later(self.host.world.timing.detect_s, lambda: self._exited(process))

    def _exited(self, process: Process) -> None:
        self.host.forget(process)
        cause = DownCause.KILLED if process.cause is DownCause.HUNG else process.cause
        self.fleet.exited(process.address, cause, self.host.world.now)
        self._carry_out()


class ModelSupervisor:
    """What a supervisor of several memory domains does."""

    def __init__(self, host: Host) -> None:
        self.host = host
        host.world.on_death = self._on_death
        host.world.on_hang = self._on_hang

    def start(self) -> None:
        scenario = self.host.world.scenario
        self._start_later(Address("scheduler", 0, 1))
        for api in range(scenario.apis):
            self._start_later(Address("api", api, 1))
        for setup in scenario.workers:
            self._start_later(Address("worker", setup.worker, 1))

    def _start_later(self, address: Address) -> None:
        self.host.later(self.host.world.timing.restart_s, lambda: self._start(address))

    def _start(self, address: Address) -> None:
        host = self.host
        host.create(address)
        if address.kind == "scheduler":
            self._tell_everything(address)
        elif address.kind == "worker":
            self._tell_scheduler(self._worker_up(address))
        else:
            self._tell_scheduler(ApiUp(address.number, address.epoch))
            if host.scheduler is not None:
                host.tell(address, SchedulerUp(host.scheduler.address.epoch))

    def _tell_everything(self, scheduler: Address) -> None:
        host = self.host
        for worker in host.workers.values():
            host.tell(scheduler, self._worker_up(worker.address))
        for api in host.apis.values():
            host.tell(scheduler, ApiUp(api.address.number, api.address.epoch))
        for pool, memory in host.memories.items():
            host.tell(scheduler, PoolUp(pool, memory.num_blocks, memory.block_size))
        for api in host.apis.values():
            host.tell(api.address, SchedulerUp(scheduler.epoch))

    def _worker_up(self, address: Address) -> WorkerUp:
        setup = self.host.setups[address.number]
        return WorkerUp(setup.worker, address.epoch, setup.pool, setup.dial)

    def _on_death(self, process: Process) -> None:
        self.host.later(self.host.world.timing.detect_s, lambda: self._fenced(process))

    def _on_hang(self, process: Process) -> None:
        def fence() -> None:
            process.cause = DownCause.HUNG
            self.host.world.kill(process)

        self.host.world.at(self.host.world.timing.hang_s, fence)

    def _fenced(self, process: Process) -> None:
        """The process group is gone: say so, and start the next incarnation."""
        address = process.address
        self.host.forget(process)
        if address.kind == "worker":
            self._tell_scheduler(WorkerDown(address.number, address.epoch, process.cause))
        elif address.kind == "api":
            self._tell_scheduler(ApiDown(address.number, address.epoch))
        else:
            for api in self.host.apis.values():
                self.host.tell(api.address, SchedulerDown(address.epoch))
        self._start_later(Address(address.kind, address.number, address.epoch + 1))

    def _tell_scheduler(self, message: Message) -> None:
        if self.host.scheduler is not None:
            self.host.tell(self.host.scheduler.address, message)
