"""The supervisor's behaviour: start, watch, fence, restart, and who is told what.

Owns the memories and the current incarnation of every process. Invariants: `WorkerDown` leaves
only after the death; a new scheduler hears of every worker that is not fenced before it hears of
the pools, so that it waits for all of them.
"""

from collections.abc import Callable
from typing import Final

from diptych.engine.core.messages import (
    Address,
    ApiDown,
    ApiUp,
    Message,
    PoolUp,
    SchedulerDown,
    SchedulerUp,
    WorkerDown,
    WorkerUp,
)
from diptych.engine.core.types import ApiId, DownCause, PoolId, WorkerId
from tests.sim.clients import Clients
from tests.sim.control import ApiProcess, SchedulerProcess
from tests.sim.memory import Memory
from tests.sim.scenario import WorkerSetup
from tests.sim.watch import Watch
from tests.sim.worker import WorkerProcess
from tests.sim.world import Process, World

SUPERVISOR: Final = Address("supervisor", 0, 1)


class Supervisor:
    """See the module docstring. It never dies: with it, everything on its host would end."""

    def __init__(
        self, world: World, memories: dict[PoolId, Memory], watch: Watch, clients: Clients
    ) -> None:
        self.world = world
        self.memories = memories
        self.watch = watch
        self.clients = clients
        self.workers: dict[WorkerId, WorkerProcess] = {}  # ready and not fenced
        self.apis: dict[ApiId, ApiProcess] = {}  # ready and not known to be dead
        self.scheduler: SchedulerProcess | None = None  # ready and not known to be dead
        world.on_death = self._on_death
        world.on_hang = self._on_hang

    def start(self) -> None:
        self._start_later(lambda: self._start_scheduler(1))
        for api in range(self.world.scenario.apis):
            self._start_later(lambda api=api: self._start_api(api, 1))  # type: ignore[misc]
        for setup in self.world.scenario.workers:
            self._start_later(lambda setup=setup: self._start_worker(setup, 1))  # type: ignore[misc]

    @property
    def whole(self) -> bool:
        """Whether every process runs."""
        scenario = self.world.scenario
        return (
            self.scheduler is not None
            and self.scheduler.alive
            and len(self.apis) == scenario.apis
            and len(self.workers) == len(scenario.workers)
            and all(p.alive for p in self.apis.values())
            and all(p.alive and not p.stuck for p in self.workers.values())
        )

    # ---- start ---------------------------------------------------------------------------------

    def _start_later(self, action: Callable[[], None]) -> None:
        self.world.at(self.world.rng.random() * self.world.timing.restart_s, action)

    def _start_worker(self, setup: WorkerSetup, epoch: int) -> None:
        address = Address("worker", setup.worker, epoch)
        memory = self.memories[setup.pool]
        process = WorkerProcess(self.world, address, setup, memory, self.watch, self.clients)
        self.world.processes[address] = process
        self.workers[setup.worker] = process
        self._tell_scheduler(WorkerUp(setup.worker, epoch, setup.pool, setup.dial))

    def _start_api(self, api: ApiId, epoch: int) -> None:
        address = Address("api", api, epoch)
        process = ApiProcess(self.world, address, self.clients)
        self.world.processes[address] = process
        self.apis[api] = process
        self._tell_scheduler(ApiUp(api, epoch))
        if self.scheduler is not None:
            self._tell(address, SchedulerUp(self.scheduler.address.epoch))

    def _start_scheduler(self, epoch: int) -> None:
        address = Address("scheduler", 0, epoch)
        process = SchedulerProcess(self.world, address, self.watch, self._quiet)
        self.world.processes[address] = process
        self.scheduler = process
        for worker, other in self.workers.items():
            setup = other.setup
            self._tell_scheduler(WorkerUp(worker, other.address.epoch, setup.pool, setup.dial))
        for api, server in self.apis.items():
            self._tell_scheduler(ApiUp(api, server.address.epoch))
        for pool, memory in self.memories.items():
            self._tell_scheduler(PoolUp(pool, memory.num_blocks, memory.block_size))
        for server in self.apis.values():
            self._tell(server.address, SchedulerUp(epoch))

    # ---- death ---------------------------------------------------------------------------------

    def _on_death(self, process: Process) -> None:
        delay = self.world.rng.random() * self.world.timing.detect_s
        self.world.at(delay, lambda: self._fenced(process))

    def _on_hang(self, process: Process) -> None:
        def fence() -> None:
            process.cause = DownCause.HUNG
            self.world.kill(process)

        self.world.note(f"{process.slot} hangs")
        self.world.at(self.world.timing.hang_s, fence)

    def _fenced(self, process: Process) -> None:
        """The process group is gone: say so, and start the next incarnation."""
        number, epoch = process.address.number, process.address.epoch
        if isinstance(process, WorkerProcess):
            setup = process.setup
            if self.workers.get(number) is process:
                del self.workers[number]
            self.watch.fenced(number, epoch)
            self._tell_scheduler(WorkerDown(number, epoch, process.cause))
            self._start_later(lambda: self._start_worker(setup, epoch + 1))
        elif isinstance(process, ApiProcess):
            self.apis.pop(number, None)
            self._tell_scheduler(ApiDown(number, epoch))
            self._start_later(lambda: self._start_api(number, epoch + 1))
        else:
            self.scheduler = None
            for server in self.apis.values():
                self._tell(server.address, SchedulerDown(epoch))
            self._start_later(lambda: self._start_scheduler(epoch + 1))

    # ---- helpers -------------------------------------------------------------------------------

    def _tell(self, to: Address, message: Message) -> None:
        self.world.transmit(SUPERVISOR, to, message)

    def _tell_scheduler(self, message: Message) -> None:
        if self.scheduler is not None:
            self._tell(self.scheduler.address, message)

    def _quiet(self, pool: PoolId, epoch: int) -> bool:
        """Whether no worker that could still run holds a sequence of an older scheduler."""
        return all(
            process.epoch in (0, epoch)
            for process in self.world.processes.values()
            if isinstance(process, WorkerProcess) and process.alive and process.setup.pool == pool
        )
