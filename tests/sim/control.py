"""The simulated scheduler process and API server: shells around the real machines.

Own one incarnation's machine each. Every command is carried out one by one; the process may die
before and after each.
"""

from collections.abc import Callable
from math import inf
from typing import Final

from diptych.engine.core.config import CacheOptions
from diptych.engine.core.errors import OverloadedError
from diptych.engine.core.messages import (
    Abort,
    Accepted,
    Address,
    Closed,
    Lost,
    Message,
    Rejected,
    SchedulerDown,
    SchedulerUp,
    Send,
    Stats,
    Submit,
)
from diptych.engine.core.types import LossCause, PoolId, RequestId
from diptych.scheduler.commands import Delivered, Ended, Refused, SchedulerCommand
from diptych.scheduler.journal import Journal
from diptych.scheduler.scheduler import Scheduler
from tests.sim.clients import Client, Clients
from tests.sim.model import RequestSpec
from tests.sim.pairs import Pairs
from tests.sim.roles import Roles
from tests.sim.watch import Watch
from tests.sim.world import Process, World, check

IDLE_S: Final = 2.0
"""Virtual seconds for which rows may wait while nothing runs."""

COLD_S: Final = 4.0
"""Virtual seconds that the first worker may take to come."""

RELEASE_S: Final = 1.0
"""Virtual seconds until the blocks of a closed request are free, if nobody dies or stands still."""


class SchedulerProcess(Process):
    """One incarnation of the scheduler."""

    def __init__(
        self,
        world: World,
        address: Address,
        watch: Watch,
        quiet: Callable[[PoolId, int], bool],
        opens_at: Callable[[PoolId], float],
    ) -> None:
        super().__init__(world, address, "s")
        scenario = world.scenario
        cache = CacheOptions(
            block_size=scenario.block_size, enable_prefix_caching=scenario.prefix_caching
        )
        self.machine = Scheduler(address.epoch, scenario.scheduler, cache)
        options = scenario.scheduler
        self.roles = Roles(address.epoch, options.steers or options.autoscale is not None)
        self.pairs = Pairs(address.epoch, watch.pool_of)
        self.idle_s = IDLE_S if options.autoscale is None else IDLE_S + COLD_S
        self.watch = watch
        self.quiet = quiet  # (pool, epoch) -> does no worker hold anything of an older epoch
        self.opens_at = opens_at  # when a page of this pool can be read
        self.inbox: list[Message] = []
        self.wakes = False
        features = frozenset(scenario.features)
        self.clogged = "clog" in features
        disturbing = ("clog", "poison", "lost_host")
        self.undisturbed = not scenario.faults and features.isdisjoint(disturbing)
        self.warded = "poison" in features
        self.apis_die = any(fault.slot[0] == "a" for fault in scenario.faults)
        self.closed: dict[tuple[RequestId, int | None], float] = {}  # when their end was heard
        self.idle_since: float | None = None  # rows wait, and nothing runs
        self.preemptions: dict[tuple[RequestId, int], int] = {}
        self.recovering: set[RequestId] = set()
        self.num_recovering = 0  # rows that are queued whatever the cap
        watch.new_scheduler(address.epoch)
        world.at(world.timing.tick_s, self._tick, self)

    def receive(self, message: Message) -> None:
        self.inbox.append(message)
        self._wake_up()

    def _wake_up(self) -> None:
        if not self.wakes:
            self.wakes = True
            delay = self.world.rng.random() * 0.0003
            if self.clogged and self.world.rng.random() < 0.02:
                delay += self.world.rng.random() * self.world.timing.spike_s  # it stands still
            self.world.at(delay, self._wake, self)

    def _wake(self) -> None:
        self.wakes = False
        inbox, self.inbox = self.inbox, []
        self._step(inbox)

    def _tick(self) -> None:
        self._step([])
        self._check_closed()
        self.world.at(self.world.timing.tick_s, self._tick, self)

    def _step(self, inputs: list[Message]) -> None:
        self.op("step")
        commands = self.machine.step(inputs, self.world.now)  # type: ignore[arg-type]
        epoch = self.address.epoch
        self.watch.begin_step()
        for message in inputs:
            if isinstance(message, Submit) and message.recovering:
                self.num_recovering += len(message.choices)
                self.recovering.add(message.request.id)
            elif isinstance(message, Closed):
                self.closed.setdefault((message.request, None), self.world.now)
            elif isinstance(message, Abort):
                self.closed.setdefault((message.request, message.choice), self.world.now)
            self.watch.scheduler_hears(epoch, message)
            self.roles.hears(message)
            self.pairs.hears(message)
        self.op("stepped")
        self._check_answers(inputs, commands)
        self.machine.check_integrity()
        for command in commands:
            if isinstance(command, Send):
                self.watch.scheduler_sends(command.to, command.message)
                self.roles.says(command.to, command.message, self.world.now)
                self.pairs.says(command.to.number, command.message)
                self._check_send(command.message)
                self.send(command.to, command.message)
            else:
                self._read_pool(command.pool)
        audit = self.machine.audit()
        busy = audit.waiting + sum(bool(row.holds) for row in audit.rows)
        if not self.warded:  # a worker that is emptied for a suspect does nothing else
            workers = self.machine._members.workers.values()
            self.roles.check_cover(busy, {worker.id for worker in workers if worker.serves})

    def _read_pool(self, pool: PoolId) -> None:
        opens_at = self.opens_at(pool)
        if opens_at > self.world.now:
            if opens_at < inf:
                self.world.at(opens_at - self.world.now, lambda: self._read_pool(pool), self)
            return
        quiet = self.quiet(pool, self.address.epoch)
        check(quiet, "pool {} is read while a worker holds it", pool)
        self.watch.pool_read(pool)
        self.inbox.append(self.watch.memories[pool].read())  # type: ignore[arg-type]
        self._wake_up()

    def _check_send(self, message: Message) -> None:
        if isinstance(message, Lost) and message.cause is LossCause.PREEMPTED:
            key = (message.ref.request, message.ref.choice)
            self.preemptions[key] = count = self.preemptions.get(key, 0) + 1
            most = self.world.scenario.scheduler.preemptions_max
            check(count <= most, "{} is preempted {} times", message.ref, count)
        if isinstance(message, Stats):
            most = self.world.scenario.scheduler.max_waiting + self.num_recovering
            check(message.waiting <= most, "{} rows wait, the cap is {}", message.waiting, most)
            self._check_idle(message)
        if isinstance(message, Rejected):
            check(message.request not in self.recovering, "{} is rejected", message.request)
        if isinstance(message, Rejected) and message.retry_after_s is not None:
            most_s = self.world.scenario.scheduler.retry_after_max_s
            check(0 < message.retry_after_s <= most_s, "retry after {}", message.retry_after_s)

    def _check_answers(self, inputs: list[Message], commands: list[SchedulerCommand]) -> None:
        """Every Submit is accepted or rejected at once, unless its API server is gone."""
        answers = {
            command.message.request
            for command in commands
            if isinstance(command, Send) and isinstance(command.message, Accepted | Rejected)
        }
        for message in inputs:
            if isinstance(message, Submit) and not self.apis_die:
                check(message.request.id in answers, "{} is not answered", message.request.id)

    def _check_closed(self) -> None:
        """What runs for nobody is given back as soon as its step is over."""
        if self.undisturbed:
            late = {key for key, at in self.closed.items() if self.world.now - at > RELEASE_S}
            for _, _, ref in self.watch.holds:
                over = (ref.request, None) in late or (ref.request, ref.choice) in late
                check(not over, "{} runs for nobody", ref)
            for key in late:
                del self.closed[key]

    def _check_idle(self, stats: Stats) -> None:
        """Work is conserved: while something waits and everybody lives, something runs."""
        now = self.world.now
        if stats.running or not stats.waiting or not stats.ready:
            self.idle_since = None
        elif self.idle_since is None:
            self.idle_since = now
        since = now if self.idle_since is None else self.idle_since
        check(now - since < self.idle_s, "{} rows wait and nothing runs", stats.waiting)


class ApiProcess(Process):
    """One incarnation of an API server, with its clients."""

    def __init__(self, world: World, address: Address, clients: Clients) -> None:
        super().__init__(world, address, f"a{address.number}")
        scenario = world.scenario
        self.clients = clients
        self.mine: dict[RequestId, Client] = {}
        self.epoch = 0  # of the last scheduler known
        self.scheduler_up = False
        self.machine = Journal(
            address.number,
            address.epoch,
            block_size=scenario.block_size,
            max_open=scenario.max_open,
            window=scenario.window,
        )
        world.at(world.timing.api_tick_s, self._tick, self)

    def died(self) -> None:
        for client in self.mine.values():
            if client.over is None:
                client.over = "api died"

    def open(self, spec: RequestSpec) -> None:
        """A client's request arrives."""
        now = self.world.now
        client = self.clients.open(spec, now)
        self.mine[client.request.id] = client
        self.op("handle")
        try:
            self.machine.open(client.request, now, spec.timeout_s)
        except OverloadedError as error:
            client.refuse(error, now)
        check(
            sum(c.over is None for c in self.mine.values()) <= self.world.scenario.max_open,
            "journal {} is over its cap",
            self.address.number,
        )
        self._flush()
        if spec.close_after_s is not None:
            self.world.at(spec.close_after_s, lambda: self._close(client), self)

    def receive(self, message: Message) -> None:
        self.op("handle")
        epoch: int = message.scheduler_epoch  # type: ignore[attr-defined]
        if isinstance(message, SchedulerUp):
            self.epoch = max(epoch, self.epoch)
            self.scheduler_up = self.scheduler_up or epoch == self.epoch
        elif isinstance(message, SchedulerDown) and epoch == self.epoch:
            self.scheduler_up = False
        if isinstance(message, Accepted) and message.request in self.mine:
            self.mine[message.request].accepted |= epoch == self.epoch
        if isinstance(message, Lost) and message.ref.request in self.mine:
            causes = self.mine[message.ref.request].causes
            causes[message.ref.choice] = causes.get(message.ref.choice, 0) + 1
        before = self.machine.stats
        self.machine.handle(message, self.world.now)  # type: ignore[arg-type]
        same = epoch == self.epoch or self.machine.stats is before
        check(same, "{}: statistics of an old scheduler", self.slot)
        self._flush(changes=epoch == self.epoch)

    def _tick(self) -> None:
        self.op("handle")
        self.machine.tick(self.world.now)
        self._flush()
        self.world.at(self.world.timing.api_tick_s, self._tick, self)

    def _close(self, client: Client) -> None:
        if client.over is None:
            self.op("handle")
            client.over = "disconnected"
            self.machine.close(client.request.id)
            self._flush()

    def _flush(self, changes: bool = True) -> None:
        now = self.world.now
        commands = self.machine.take()
        check(changes or not commands, "a message of an old epoch changes journal {}", self.slot)
        while commands:
            for command in commands:
                if isinstance(command, Send):
                    message = command.message
                    if isinstance(message, Submit):
                        client = self.mine[message.request.id]
                        client.submit(message.choices, self.epoch)
                    self.send(command.to, message)
                    continue
                client = self.mine[command.request]
                if client.over == "disconnected":
                    continue  # was on its way when the client went
                if isinstance(command, Delivered):
                    self._deliver(client, command)
                elif isinstance(command, Ended):
                    client.ended(now)
                else:
                    assert isinstance(command, Refused)
                    client.refuse(command.error, now)
            commands = self.machine.take()
        self.machine.check_integrity()

    def _deliver(self, client: Client, command: Delivered) -> None:
        spec = client.spec
        client.deliver(command.tokens)
        choice = command.tokens.ref.choice
        stop = spec.stops.get(choice)
        if stop is not None and len(client.seen[choice]) >= stop and choice not in client.finished:
            client.stopped.add(choice)
            self.machine.stop(command.request, choice)
            self._check_stop(client, choice)
        if spec.close_after_tokens is not None and client.num_seen >= spec.close_after_tokens:
            self._close_now(client)

    def _check_stop(self, client: Client, choice: int) -> None:
        """What runs for a stopped choice must be told to end; only the scheduler can be told."""
        told = [c.message for c in self.machine._commands if isinstance(c, Send)]
        due = self.scheduler_up and client.submitted_to == self.epoch
        check(
            not due or any(isinstance(message, Abort | Closed) for message in told),
            "{}/{} is stopped, but its worker is not told",
            client.request.id,
            choice,
        )

    def _close_now(self, client: Client) -> None:
        if client.over is None:
            client.over = "disconnected"
            self.machine.close(client.request.id)
