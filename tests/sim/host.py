"""The processes of one simulated host, whoever decides about them.

Owns the current incarnation of every process. Invariant: what a process holds is known to the
ownership model as gone from the moment its exit was awaited, not before.
"""

from collections.abc import Callable
from typing import Final

from diptych.engine.core.config import WorkerSpec
from diptych.engine.core.messages import Address, Message
from diptych.engine.core.types import ApiId, PoolId, WorkerId
from tests.sim.clients import Clients
from tests.sim.control import ApiProcess, SchedulerProcess
from tests.sim.memory import Memory
from tests.sim.watch import Watch
from tests.sim.worker import WorkerProcess
from tests.sim.world import Process, World

SUPERVISOR: Final = Address("supervisor", 0, 1)


class Host:
    """Makes processes and forgets them."""

    def __init__(
        self, world: World, memories: dict[PoolId, Memory], watch: Watch, clients: Clients
    ) -> None:
        self.world = world
        self.memories = memories
        self.watch = watch
        self.clients = clients
        self.setups = {setup.worker: setup for setup in world.scenario.workers}
        self.workers: dict[WorkerId, WorkerProcess] = {}  # ready and not fenced
        self.apis: dict[ApiId, ApiProcess] = {}  # ready and not known to be dead
        self.scheduler: SchedulerProcess | None = None  # ready and not known to be dead
        self.changed_at = 0.0  # when a worker came or went last
        self.num_wanted: Callable[[], int] = lambda: len(self.setups)  # workers
        self.opens_at: Callable[[PoolId], float] = lambda pool: 0.0  # for words about it

    @property
    def whole(self) -> bool:
        """Whether every process runs."""
        scenario = self.world.scenario
        return (
            self.scheduler is not None
            and self.scheduler.alive
            and len(self.apis) == scenario.apis
            and len(self.workers) == self.num_wanted()
            and all(p.alive for p in self.apis.values())
            and all(p.alive and not p.stuck for p in self.workers.values())
        )

    def create(self, address: Address) -> Process:
        """A new incarnation, listening at its address."""
        number = address.number
        process: WorkerProcess | ApiProcess | SchedulerProcess
        if address.kind == "worker":
            setup = self.setups[number]
            process = WorkerProcess(
                self.world, address, setup, self.memories, self.watch, self.clients
            )
            self.workers[number] = process
            self.changed_at = self.world.now
        elif address.kind == "api":
            process = ApiProcess(self.world, address, self.clients)
            self.apis[number] = process
        else:
            process = SchedulerProcess(self.world, address, self.watch, self.quiet, self.opens_at)
            self.scheduler = process
        self.world.processes[address] = process
        return process

    def forget(self, process: Process) -> None:
        """Its exit was awaited."""
        number = process.address.number
        if isinstance(process, WorkerProcess):
            del self.workers[number]
            self.changed_at = self.world.now
            self.watch.fenced(number, process.address.epoch)
            self.world.haunt(process.address)
        elif isinstance(process, ApiProcess):
            del self.apis[number]
        else:
            self.scheduler = None

    def add(self, memory: Memory, workers: list[WorkerSpec]) -> None:
        """A further memory domain and those that will work in it."""
        self.memories[memory.pool] = memory
        self.watch.add_pool(memory, [setup.worker for setup in workers])
        self.setups |= {setup.worker: setup for setup in workers}

    def later(self, most_s: float, action: Callable[[], None]) -> None:
        self.world.at(self.world.rng.random() * most_s, action)

    def tell(self, to: Address, message: Message) -> None:
        self.world.transmit(SUPERVISOR, to, message)

    def quiet(self, pool: PoolId, epoch: int) -> bool:
        """Whether no worker that could still run holds a sequence of an older scheduler."""
        return all(
            process.epoch in (0, epoch)
            for process in self.world.processes.values()
            if isinstance(process, WorkerProcess) and process.alive and process.setup.pool == pool
        )
