"""One run of one scenario, from the first process to rest.

Invariant: after the last fault and arrival everything comes to rest within bounded virtual time,
and then nothing is left over anywhere.
"""

from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from diptych.engine.core.messages import Stats
from diptych.engine.core.types import PoolId
from tests.sim.clients import Clients
from tests.sim.host import Host
from tests.sim.memory import Memory
from tests.sim.model import Oracle, RequestSpec
from tests.sim.scenario import Scenario
from tests.sim.supervisor import Supervisor
from tests.sim.watch import Watch
from tests.sim.worker import WorkerProcess
from tests.sim.world import Violation, World, check

REST_S: Final = 60.0
"""Virtual seconds after the last disturbance within which every request must have ended, beyond
those that the requests take one after the other and token by token."""
SETTLE_S: Final = 3.0
"""Virtual seconds after the last end within which everything must be given back."""
ON_ITS_WAY_S: Final = 1.5
"""Virtual seconds that a message may need."""
EVENTS_MAX: Final = 60_000


@dataclass(slots=True)
class Outcome:
    """What one run did. `violation` None: all invariants held."""

    scenario: Scenario
    num_events: int
    violation: str | None
    kind: str  # of the violation, without this run's values
    trace: list[tuple[float, str, object]]
    ends: dict[str, int]

    @property
    def digest(self) -> str:
        """Equal for equal runs."""
        last = repr((self.num_events, self.violation, self.trace, self.ends))
        return sha256(last.encode()).hexdigest()


class Simulation:
    """See the module docstring."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.world = World(scenario)
        self.oracle = Oracle(scenario.block_size, scenario.max_model_len)
        self.clients = Clients(self.oracle, scenario)
        self.memories: dict[PoolId, Memory] = {
            pool: Memory(pool, scenario.num_blocks, scenario.block_size)
            for pool in range(scenario.pools)
        }
        pool_of = {setup.worker: setup.pool for setup in scenario.workers}
        self.watch = Watch(
            self.memories,
            pool_of,
            self.oracle,
            scenario.scheduler.max_num_seqs,
            scenario.prefix_caching,
        )
        self.host = Host(self.world, self.memories, self.watch, self.clients)
        self.supervisor = Supervisor(self.host)

    def run(self) -> Outcome:
        """Runs to rest, or to the first violation."""
        violation: str | None = None
        kind = ""
        try:
            self._run()
        except Violation as error:
            violation, kind = str(error), error.kind
        except Exception as error:  # an assertion or error of the product is a finding too
            kind = f"{type(error).__name__}{_where(error)}"
            violation = f"{kind}: {error}"
        ends: dict[str, int] = {}
        for client in self.clients.by_id.values():
            ends[str(client.over)] = ends.get(str(client.over), 0) + 1
        return Outcome(
            self.scenario, self.world.num_events, violation, kind, list(self.world.trace), ends
        )

    def _run(self) -> None:
        world = self.world
        self.supervisor.start()
        last = serial_s = 0.0
        timing = self.scenario.timing
        for spec in self.scenario.requests:
            last = max(last, spec.at)
            steps = spec.n * (spec.max_tokens + len(spec.prompt))
            trips = spec.n * (4 + spec.max_tokens // self.scenario.block_size)
            serial_s += steps * timing.step_s + trips * timing.spike_s
            world.at(spec.at, lambda spec=spec: self._arrive(spec))  # type: ignore[misc]
        while True:
            world.run_one()
            check(world.num_events < EVENTS_MAX, "more than {} events", EVENTS_MAX)
            if world.now > last and not self.clients.num_open and self.host.whole:
                break
            overdue = max(last, world.last_fault) + REST_S + serial_s
            if world.now > overdue:
                waiting = [c.request.id for c in self.clients.by_id.values() if c.over is None]
                check(False, "no progress: {} never end", waiting)
        self._settle()

    def _arrive(self, spec: RequestSpec) -> None:
        process = self.host.apis.get(spec.api)
        if process is None or not process.alive:
            return  # connection refused
        self.world.at(0.0, lambda: process.open(spec), process)

    def _settle(self) -> None:
        """Everything has ended: all must be given back, and the machines must be empty."""
        world = self.world
        end = world.now + SETTLE_S
        while world.now < end:
            world.run_one()
        if world.last_fault + SETTLE_S > world.now or not self.host.whole:
            return self._again()
        assert self.host.scheduler is not None
        known = self.host.scheduler.machine._members.workers.keys()
        settled = world.now - self.host.changed_at > ON_ITS_WAY_S
        check(
            not settled or known == self.host.workers.keys(),
            "the scheduler knows workers {}",
            sorted(known),
        )
        pools = self.host.scheduler.machine._members.pools.keys()
        left = pools - self.supervisor.hosts.living_pools()
        check(not settled or not left, "the scheduler knows pools {} at rest", left)
        for key, hold in self.watch.holds.items():
            check(False, "{} still holds {} at rest", key, hold.table)
        for process in self.host.workers.values():
            check(process.batcher.num_sequences == 0, "{} has sequences at rest", process.slot)
            late = self.scenario.zombies  # a seal that came for a second time waits, in its cap
            check(late or not process.batcher._seals._early, "{} has seals at rest", process.slot)
            check(process.plan is None, "{} is in a step at rest", process.slot)
            self._settled_dial(process)
            self._settled_transfers(process)
        stats = self._stats()
        check(stats is not None, "no statistics at rest")
        if stats is not None:
            left = (stats.running, stats.waiting, stats.blocks_used)
            check(left == (0, 0, 0), "left at rest: running, waiting, blocks {}", left)
            check(stats.ready, "the scheduler is not ready at rest")
        assert self.host.scheduler is not None
        audit = self.host.scheduler.machine.audit()
        check(not audit.rows, "the scheduler still has rows at rest: {}", audit.rows)
        lies = 0 if self.scenario.zombies else audit.ignored_commits  # a report that comes twice
        waiting = (audit.waiting, audit.waiting_tokens, lies)
        check(waiting == (0, 0, 0), "left at rest: rows, tokens, lies {}", waiting)
        for pool in audit.pools.values():
            used = pool.private + pool.shared + pool.hungry + pool.draining
            check(used == 0, "pool is not at rest: {}", pool)
        for api in self.host.apis.values():
            check(api.machine.num_open == 0, "{} has open requests at rest", api.slot)

    def _settled_dial(self, process: WorkerProcess) -> None:
        assert self.host.scheduler is not None
        roles, number = self.host.scheduler.roles, process.address.number
        if self.world.now - roles.moved_at.get(number, 0.0) < ON_ITS_WAY_S:
            return
        told = roles.told.get(number)
        mine = (process.address.epoch, process.batcher.dial)
        worker = self.host.scheduler.machine._members.workers[number]
        check(told == (worker.epoch, worker.dial), "{} was told {}, not", process.slot, told)
        check(told == mine, "{} has the dial {}, the scheduler says {}", process.slot, mine, told)

    def _settled_transfers(self, process: WorkerProcess) -> None:
        mover, exchange = process.mover, process.batcher._exchange
        left = (len(mover.puller), len(mover.reads), len(exchange.pulling), len(exchange.stale))
        check(not any(left), "{} still pulls at rest: {}", process.slot, left)
        check(not exchange.join_due, "{} has not joined at rest", process.slot)

    def _again(self) -> None:
        """A fault came while settling: wait once more for the whole."""
        limit = self.world.now + REST_S
        while not self.host.whole:
            self.world.run_one()
            check(self.world.now < limit, "the processes never come back")
        self._settle()

    def _stats(self) -> Stats | None:
        for _, _, value in reversed(self.world.trace):
            if isinstance(value, Stats):
                return value
        return None


def _where(error: BaseException) -> str:
    """File and line of the innermost frame."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    if frame is None:
        return ""
    return f" ({frame.tb_frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.tb_lineno})"


def simulate(scenario: Scenario) -> Outcome:
    return Simulation(scenario).run()
