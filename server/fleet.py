"""The supervisor's decisions: which process runs, is announced, is killed, is started again. Pure.

Owns the state of every process of one host. Events and `now` in, commands out; no I/O, no clock.
Invariants: a worker is announced down only after its exit was awaited; a process of epoch e + 1
starts only after epoch e is gone; whoever comes up is told of all that are up, and only those.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import msgspec

from diptych.engine.core.config import WorkerSpec
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

START_S_MAX: Final = 120.0
"""A process that was started and does not answer for so long is killed."""
FAST_FAULT_S: Final = 10.0
"""A process that lived for less ended fast."""
FAST_FAULTS_FREE: Final = 3
"""So many fast faults in a row are answered by an immediate restart."""
BACKOFF_S: Final = 0.25
BACKOFF_S_MAX: Final = 10.0


class State(StrEnum):
    DOWN = "down"  # starts at `start_at`
    STARTING = "starting"  # started, has not announced itself
    UP = "up"
    FENCING = "fencing"  # killed, its exit is awaited


class Start(msgspec.Struct, frozen=True):
    """Start this incarnation; answered by `ready` and `exited`."""

    address: Address


class Kill(msgspec.Struct, frozen=True):
    """Kill its process group; answered by `exited`."""

    address: Address
    reason: str


class GiveUp(msgspec.Struct, frozen=True):
    """It never came up and will not: the server cannot start."""

    reason: str


FleetCommand = Start | Kill | Send | GiveUp


@dataclass(slots=True)
class Member:
    """One process over all its incarnations; `address` is the current one, or the next."""

    address: Address
    external: bool = False  # not ours to start: the caller of start_engine
    state: State = State.DOWN
    since_s: float = 0.0
    start_at_s: float = 0.0
    fast_faults: int = 0  # in a row
    ever_up: bool = False
    announced: bool = False  # this incarnation was up
    hung: bool = False  # killed because it stood still
    beat: int | None = None  # last reading of its progress counter
    beat_at_s: float = 0.0


class Fleet:
    """All processes of one host: scheduler, workers, API servers."""

    def __init__(
        self,
        workers: list[WorkerSpec],
        *,
        num_apis: int,
        external_api: bool,
        pools: list[PoolUp],
        hang_s: float,
    ) -> None:
        self._specs = {spec.worker: spec for spec in workers}
        self._pools = pools
        self._hang_s = hang_s
        self._scheduler = Member(Address("scheduler", 0, 1))
        self._workers = [Member(Address("worker", spec.worker, 1)) for spec in workers]
        self._apis = [
            Member(Address("api", number, 1), external=external_api) for number in range(num_apis)
        ]
        self._can_fork = False
        self._model_known = False
        self._draining = False
        self._checked_s: float | None = None
        self._commands: list[FleetCommand] = []

    # ---- events

    def model_ready(self) -> None:
        """Workers can be forked, and the facts that API servers need are known."""
        self._can_fork = self._model_known = True

    def model_lost(self) -> None:
        """The warm parent is gone; living workers stay, new ones wait."""
        self._can_fork = False

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
        if not member.ever_up and (cause is DownCause.FAULT or address.kind == "api"):
            self._commands.append(GiveUp(f"{address.kind} {address.number} ended while starting"))
        member.address = Address(address.kind, address.number, address.epoch + 1)
        self._enter(member, State.DOWN, now)
        member.start_at_s = now + _backoff_s(member.fast_faults)
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
            if found is None or found.state is not State.UP:
                continue
            if beat != found.beat:
                found.beat, found.beat_at_s = beat, now
            elif now - found.beat_at_s > self._hang_s:
                found.hung = True
                self._kill(found, f"no progress for {now - found.beat_at_s:.1f} s", now)

    def stuck(self, address: Address, now: float) -> None:
        """A peer's queue to it is full: it has stopped reading, and messages to it were lost."""
        found = self._find(address)
        if found is not None and found.state is State.UP and not found.external:
            found.hung = True
            self._kill(found, "it has stopped reading its messages", now)

    def tick(self, now: float) -> None:
        """Starts what is due, kills what does not come up."""
        for member in self._all():
            if member.state is State.DOWN and now >= member.start_at_s and self._may_start(member):
                self._enter(member, State.STARTING, now)
                self._commands.append(Start(member.address))
            elif self._is_late(member, now):
                self._kill(member, f"not up after {START_S_MAX:g} s", now)

    def take(self) -> list[FleetCommand]:
        commands, self._commands = self._commands, []
        return commands

    # ---- questions

    def engine_up(self) -> bool:
        """Scheduler and all workers are up."""
        members = [self._scheduler, *self._workers]
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

    def states(self) -> list[tuple[Address, State]]:
        return [(member.address, member.state) for member in self._all()]

    # ---- inside

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
                return self._can_fork
            case "api":
                return self._model_known and not member.external and not self._draining
            case _:
                return True

    def _is_late(self, member: Member, now: float) -> bool:
        starting = member.state is State.STARTING and not member.external
        return starting and now - member.since_s > START_S_MAX

    def _enter(self, member: Member, state: State, now: float) -> None:
        member.state = state
        member.since_s = now

    def _kill(self, member: Member, reason: str, now: float) -> None:
        self._enter(member, State.FENCING, now)
        self._commands.append(Kill(member.address, reason))

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
        for pool in self._pools:
            self._tell_scheduler(pool)
        apis = self.up("api")
        for api in apis:
            self._tell_scheduler(ApiUp(api.number, api.epoch))
        for api in apis:
            self._commands.append(Send(api, SchedulerUp(self._scheduler.address.epoch)))

    def _worker_up(self, member: Member) -> WorkerUp:
        spec = self._specs[member.address.number]
        return WorkerUp(spec.worker, member.address.epoch, spec.pool, spec.dial)


def _backoff_s(fast_faults: int) -> float:
    if fast_faults <= FAST_FAULTS_FREE:
        return 0.0
    return min(BACKOFF_S_MAX, BACKOFF_S * 2.0 ** min(fast_faults - FAST_FAULTS_FREE, 10))
