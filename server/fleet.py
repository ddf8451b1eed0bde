"""The supervisor's decisions: which process runs, is announced, is killed, is started again. Pure.

Owns the state of every process of one server, on all its hosts; host 0 is its own. Events and `now`
in, commands out; no I/O, no clock. Invariants: a worker is announced down only after its exit was
awaited, or with its whole host, whose memory is then never used again; a process of epoch e + 1
starts only after epoch e is gone; whoever comes up is told of all that are up, and only those.
"""

from collections.abc import Iterable, Iterator, Mapping

import msgspec

from diptych.engine.core.config import WorkerSpec
from diptych.engine.core.messages import (
    Address,
    ApiDown,
    ApiUp,
    Drain,
    Message,
    PoolDown,
    PoolUp,
    SchedulerDown,
    SchedulerUp,
    Send,
    StartTimes,
    WorkerDown,
    WorkerUp,
)
from diptych.engine.core.types import DownCause
from diptych.server.fleet_cuts import Cuts
from diptych.server.fleet_members import (
    FAST_FAULT_S,
    HOME,
    LEAVE_S_MAX,
    START_S_MAX,
    STILL_S_MAX,
    FleetCommand,
    GiveUp,
    Kill,
    Member,
    Rest,
    Start,
    State,
    Wake,
    backoff_s,
)
from diptych.server.fleet_places import HostPlaces


class Fleet:
    """All processes: scheduler, workers, API servers. `workers` and `pools`: of the own host.

    num_workers: so many are awaited until the engine counts as started; None: the own ones.
    """

    def __init__(
        self,
        workers: list[WorkerSpec],
        *,
        num_apis: int,
        external_api: bool,
        pools: list[PoolUp],
        hang_s: float,
        num_workers: int | None = None,
        num_started: int | None = None,
        elastic: int | None = None,
    ) -> None:
        """num_started: so many workers run from the start, the others when they are asked for.
        elastic: other hosts bring one worker each, so many from the start; they come and go."""
        self._specs = {spec.worker: spec for spec in workers}
        self._pools = [(HOME, pool) for pool in pools]
        self._hang_s = hang_s
        self._num_awaited = len(workers) if num_workers is None else num_workers
        self._scheduler = Member(Address("scheduler", 0, 1))
        self._workers = [Member(Address("worker", spec.worker, 1)) for spec in workers]
        for member in self._workers[num_started:] if num_started is not None else []:
            member.wanted = False
        self._places = None if elastic is None else HostPlaces(elastic)
        self._resting = False
        self._load_s = (0.0, 0.0)  # of a model that no worker was started from yet
        self._apis = [
            Member(Address("api", number, 1), external=external_api) for number in range(num_apis)
        ]
        self._apart = False  # pools were lost
        self._can_fork: set[int] = set()  # hosts
        self._cuts = Cuts()
        self._was_up = False
        self._model_known = False
        self._draining = False
        self._checked_s: float | None = None
        self._commands: list[FleetCommand] = []

    # ---- events

    def model_ready(self, host: int = HOME, import_s: float = 0.0, weights_s: float = 0.0) -> None:
        """Workers can be started there, and the facts that API servers need are known."""
        self._can_fork.add(host)
        self._model_known = True
        self._load_s = (import_s, weights_s)

    def model_lost(self, host: int = HOME) -> None:
        """The warm parent is gone; living workers stay, new ones wait."""
        self._can_fork.discard(host)

    def join(
        self,
        host: int,
        workers: list[WorkerSpec],
        pools: list[PoolUp],
        apis: Iterable[int] = (),
    ) -> None:
        """Another host: its workers start once its model is ready."""
        self._apis += [Member(Address("api", number, 1), host) for number in apis]
        self._specs |= {spec.worker: spec for spec in workers}
        self._workers += [Member(Address("worker", spec.worker, 1), host) for spec in workers]
        self._pools += [(host, pool) for pool in pools]
        for pool in pools:
            self._tell_scheduler(pool)

    def leave(self, host: int) -> list[Address]:
        """The host is lost, or left. What ran there may still run, cut off; its memory is never
        used again, and neither are the numbers of its workers. Returns who was there."""
        gone = [m for m in (*self._workers, *self._apis) if m.host == host]
        self._workers = [member for member in self._workers if member.host != host]
        self._apis = [member for member in self._apis if member.host != host]
        self._can_fork.discard(host)
        if self._places is not None:
            self._places.gone(host)
        for member in gone:
            self._tell_of_exit(member, DownCause.KILLED)
            if member.address.kind == "worker":
                del self._specs[member.address.number]
        for owner, pool in self._pools:
            if owner == host:
                self._apart = True
                self._tell_scheduler(PoolDown(pool.pool))
        self._pools = [(owner, pool) for owner, pool in self._pools if owner != host]
        return [member.address for member in gone]

    def host_of(self, address: Address) -> int:
        member = self._find(address)
        return HOME if member is None else member.host

    def grow(self, scheduler_epoch: int, count: int) -> None:
        """So many workers are wanted, as far as there are places; a leaving one comes again, unless
        its host goes with it."""
        if scheduler_epoch != self._scheduler.address.epoch:
            return
        if self._places is not None:
            self._places.wish = count
            return
        free = [member for member in self._workers if not member.wanted]
        for member in free[: max(0, count - len(self._workers) + len(free))]:
            member.wanted = True

    def retire(
        self, scheduler_epoch: int, address: Address, now: float, wanted: int | None = None
    ) -> None:
        """It holds nothing, is given nothing, and is not to be started again; `wanted` are left."""
        member = self._find(address)
        if scheduler_epoch != self._scheduler.address.epoch or member is None:
            return
        if member.state is State.UP and address.kind == "worker":
            member.wanted = False
            if self._places is not None and wanted is not None:
                self._places.wish = wanted
            self._enter(member, State.LEAVING, now)
            self._commands.append(Send(address, Drain(0.0)))

    def started(self, address: Address, now: float) -> None:
        """Its process runs."""
        member = self._find(address)
        if member is not None:
            member.forked_s = now

    def drain(self) -> None:
        """API servers that end are not started again."""
        self._draining = True

    def ready(self, address: Address, now: float) -> None:
        member = self._find(address)
        if member is None or member.state is State.UP:
            return
        if member.external and member.state is State.DOWN:
            member.state = State.STARTING
        if member.state is not State.STARTING:
            return
        self._enter(member, State.UP, now)
        member.announced = member.ever_up = True
        member.beat_at_s = now
        if address.kind == "worker":
            import_s, weights_s = self._load_s
            self._load_s = (0.0, 0.0)
            fork_s, ready_s = member.forked_s - member.ordered_s, now - member.forked_s
            member.start = StartTimes(import_s, weights_s, max(0.0, fork_s), ready_s)
        self.engine_up()
        if member is self._scheduler:
            self._tell_scheduler_everything()
        elif self._scheduler.state is State.UP:
            if address.kind == "worker":
                self._tell_scheduler(self._worker_up(member))
            else:
                self._tell_scheduler(ApiUp(address.number, address.epoch))
                self._commands.append(Send(address, SchedulerUp(self._scheduler.address.epoch)))

    def exited(self, address: Address, cause: DownCause, now: float) -> None:
        """Its process is gone, its status was read, its process group is empty."""
        member = self._find(address)
        if member is None or member.state is State.DOWN:
            return
        if member.hung:
            cause = DownCause.HUNG
        self._tell_of_exit(member, cause)
        failed = not member.announced or cause is not DownCause.KILLED
        fast = failed and (not member.announced or now - member.since_s < FAST_FAULT_S)
        member.fast_faults = member.fast_faults + 1 if fast else 0
        is_api = address.kind == "api"
        at_start = not member.ever_up and (is_api or not self._was_up)
        if at_start and (is_api or cause is DownCause.FAULT):
            self._commands.append(GiveUp(f"{address.kind} {address.number} ended while starting"))
        member.address = Address(address.kind, address.number, address.epoch + 1)
        self._enter(member, State.DOWN, now)
        member.start_at_s = now + backoff_s(member.fast_faults)
        member.announced = member.hung = False
        member.beat = None

    def beats(self, readings: Mapping[Address, int], now: float) -> None:
        """Progress counters of workers and scheduler; one that stands still is a hang."""
        if self._checked_s is not None and now - self._checked_s > self._hang_s / 2:
            for member in self._all():  # we stood still ourselves: the readings prove nothing
                member.beat_at_s = now
        self._checked_s = now
        for address, beat in readings.items():
            found = self._find(address)
            if found is None or found.state not in (State.UP, State.STARTING):
                continue
            up = found.state is State.UP
            if beat != found.beat:
                found.beat, found.beat_at_s = beat, now
            elif now - found.beat_at_s > (self._hang_s if up else max(self._hang_s, STILL_S_MAX)):
                found.hung = True
                self._kill(found, f"no progress for {now - found.beat_at_s:.1f} s", now)

    def stuck(self, address: Address, now: float) -> None:
        """A peer's queue to it is full: it has stopped reading, and messages to it were lost."""
        found = self._find(address)
        if found is not None and found.state is State.UP and not found.external:
            found.hung = True
            self._kill(found, "it has stopped reading its messages", now)

    def cut(self, sender: Address, peer: Address, now: float) -> None:
        """The connection from one to the other broke: messages may be lost for good."""
        if self._find(sender) is not None and self._find(peer) is not None:
            self._cuts.add(sender, peer, now)

    def tick(self, now: float) -> None:
        """Starts what is due, kills what does not come up, and who was cut off from a living."""
        self._judge_cuts(now)
        for member in self._all():
            if member.state is State.DOWN and now >= member.start_at_s and self._may_start(member):
                self._enter(member, State.STARTING, now)
                member.ordered_s = member.forked_s = member.beat_at_s = now
                self._commands.append(Start(member.address))
            elif self._is_late(member, now):
                self._kill(member, f"not up after {START_S_MAX:g} s", now)
            elif member.state is State.LEAVING and now - member.since_s > LEAVE_S_MAX:
                self._kill(member, f"did not leave within {LEAVE_S_MAX:g} s", now)
        self._rest_or_wake()
        if self._places is not None:
            self._commands += self._places.orders(self._workers)

    def take(self) -> list[FleetCommand]:
        commands, self._commands = self._commands, []
        return commands

    # ---- questions

    def engine_up(self) -> bool:
        """Scheduler and all workers that are wanted are up, as many as are awaited."""
        members = [self._scheduler, *(member for member in self._workers if member.wanted)]
        if len(self._workers) < self._num_awaited:
            return False
        self._was_up = self._was_up or all(member.state is State.UP for member in members)
        return all(member.state is State.UP for member in members)

    def apis_gone(self) -> bool:
        return all(member.state is State.DOWN for member in self._apis)

    def up(self, kind: str) -> list[Address]:
        """Addresses of the running processes of one kind."""
        return [
            member.address
            for member in self._all()
            if member.state is State.UP and member.address.kind == kind
        ]

    def watched(self) -> list[Address]:
        """Whose progress counters `beats` wants: workers and scheduler that run or start."""
        return [
            member.address
            for member in [self._scheduler, *self._workers]
            if member.state in (State.UP, State.STARTING)
        ]

    def specs(self) -> list[WorkerSpec]:
        """Of all hosts."""
        return list(self._specs.values())

    def leaves(self, address: Address) -> bool:
        """It was retired, and goes of its own."""
        member = self._find(address)
        return member is not None and member.state is State.LEAVING

    def states(self) -> list[tuple[Address, State]]:
        return [(member.address, member.state) for member in self._all()]

    def _all(self) -> Iterator[Member]:
        yield self._scheduler
        yield from self._workers
        yield from self._apis

    def _find(self, address: Address) -> Member | None:
        """None when this incarnation is over."""
        return next((member for member in self._all() if member.address == address), None)

    def _may_start(self, member: Member) -> bool:
        match member.address.kind:
            case "worker":
                return member.host in self._can_fork and member.wanted
            case "api":
                return self._model_known and not member.external and not self._draining
            case _:
                return True

    def _is_late(self, member: Member, now: float) -> bool:
        starting = member.state is State.STARTING and not member.external
        return starting and now - member.since_s > START_S_MAX

    def _rest_or_wake(self) -> None:
        """Without any worker, and none wanted, the loaded weights are not kept either."""
        wanted = any(member.wanted for member in self._workers)
        if self._resting and wanted:
            self._resting = False
            self._commands.append(Wake())
        elif not wanted and HOME in self._can_fork:
            if all(member.state is State.DOWN for member in self._workers):
                self._resting = True
                self._can_fork.discard(HOME)
                self._commands.append(Rest())

    def _enter(self, member: Member, state: State, now: float) -> None:
        member.state = state
        member.since_s = now

    def _kill(self, member: Member, reason: str, now: float) -> None:
        self._enter(member, State.FENCING, now)
        self._commands.append(Kill(member.address, reason))

    def _judge_cuts(self, now: float) -> None:
        for sender, peer in self._cuts.due(now):
            both = [self._find(peer), self._find(sender)]
            up = [member for member in both if member is not None and member.state is State.UP]
            workers = [member for member in up if member.address.kind == "worker"]
            if len(up) == 2 and workers:
                self._kill(workers[0], "its connection to another process broke", now)

    def _tell_of_exit(self, member: Member, cause: DownCause) -> None:
        address = member.address
        if not member.announced:
            return
        match address.kind:
            case "worker":
                self._tell_scheduler(WorkerDown(address.number, address.epoch, cause))
            case "api":
                self._tell_scheduler(ApiDown(address.number, address.epoch))
            case _:
                for api in self.up("api"):
                    self._commands.append(Send(api, SchedulerDown(address.epoch)))

    def _tell_scheduler(self, message: Message) -> None:
        if self._scheduler.state is State.UP:
            self._commands.append(Send(self._scheduler.address, message))

    def _tell_scheduler_everything(self) -> None:
        """Workers before their pool, which is read once each of them joined or is gone: those that
        are being fenced are not gone yet. API servers before they may submit."""
        for member in self._workers:
            if member.announced:
                self._tell_scheduler(self._worker_up(member))
        for _, pool in self._pools:
            self._tell_scheduler(msgspec.structs.replace(pool, apart=self._apart))
        apis = self.up("api")
        for api in apis:
            self._tell_scheduler(ApiUp(api.number, api.epoch))
        for api in apis:
            self._commands.append(Send(api, SchedulerUp(self._scheduler.address.epoch)))

    def _worker_up(self, member: Member) -> WorkerUp:
        spec = self._specs[member.address.number]
        return WorkerUp(spec.worker, member.address.epoch, spec.pool, spec.dial, member.start)
