"""The supervisor of a server: starts, watches, fences, announces. No torch.

Owns the server's own host (host.py) and, in a cluster, the link to the others (remote_hosts.py).
`Fleet` decides; this shell only carries out. Invariant: when it ends, in whatever way, everything
that it started ends, on all hosts.
"""

import logging
import secrets
import sys
import time
from typing import Final

import msgspec

from diptych.engine.core.errors import ConfigError, DiptychError, EngineDeadError, ModelLoadError
from diptych.engine.core.messages import (
    Address,
    AnyMessage,
    AskPage,
    Cut,
    Drain,
    Grow,
    PageRows,
    PoolUp,
    Ready,
    Retire,
    SchedulerDown,
    SchedulerUp,
    Send,
    Stuck,
)
from diptych.server.boot import ApiBoot, ApiProcessBoot, SupervisorBoot
from diptych.server.client import EngineInfo
from diptych.server.companion import ray_companion
from diptych.server.fleet import Fleet
from diptych.server.fleet_members import HOME, Dismiss, GiveUp, Kill, Places, Rest, Start, Wake
from diptych.server.host import TICK_S, Host
from diptych.server.introductions import Introductions
from diptych.server.launcher import (
    LauncherEvent,
    ModelFailed,
    ModelLoading,
    ModelLost,
    ModelReady,
    ProcessExited,
    ProcessStarted,
)
from diptych.server.link_wire import Forward, HostHeard, StartApi
from diptych.server.logs import configure_logs
from diptych.server.progress_bar import ProgressBar
from diptych.server.remote_hosts import HostEvent, HostJoined, HostLost, HostNews, RemoteHosts
from diptych.server.starter import Starter
from diptych.server.status import Listening, Progressed, Started
from diptych.transfer.processes import name_process, process_name

EXIT_S_MAX: Final = 1.0  # for an orderly exit after a drain
LAUNCHES_MAX: Final = 3  # of a launcher that fails before anything is up
_ERRORS: Final[dict[str, type[DiptychError]]] = {
    "ConfigError": ConfigError,
    "ModelLoadError": ModelLoadError,
}

_log = logging.getLogger("diptych")


class Supervisor:
    """`run` once; it must have the main thread, for the signals."""

    def __init__(self, boot: SupervisorBoot) -> None:
        configure_logs("supervisor", boot.log_level)
        name_process("supervisor")
        self._boot = boot
        cluster, options = boot.cluster, boot.options
        local = cluster is None or cluster.local_workers
        workers = options.workers() if local else []
        num_apis = boot.num_apis if boot.api_target is not None else None
        self._hosts = (
            RemoteHosts(cluster, options, boot.log_level, num_apis) if cluster is not None else None
        )
        try:
            self._host = Host(
                options,
                workers,
                transfer_key=secrets.token_hex(32)
                if self._hosts is None
                else self._hosts.transfer_key,
                network=None if cluster is None else cluster.network,
                log_level=boot.log_level,
            )
        except BaseException:
            if self._hosts is not None:
                self._hosts.close()
            raise
        layout = self._host.layout
        self._starter = Starter(boot.control_fd)
        self._fleet = Fleet(
            workers,
            num_apis=boot.num_apis,
            external_api=boot.api_target is None,
            pools=[PoolUp(p.pool, layout.num_blocks, layout.block_size) for p in layout.pools],
            hang_s=options.hang_s,
            num_workers=options.num_started if options.elastic_hosts else len(options.workers()),
            num_started=None if options.scheduler.autoscale is None else options.num_started,
            elastic=options.num_started if options.elastic_hosts else None,
        )
        self._salt_key = secrets.token_hex(32)
        self._introductions = Introductions(self._hosts, self._fleet, self._host.channels)
        self._bar = ProgressBar("packing the weights", sys.stderr, self._progress)
        self._info: EngineInfo | None = None
        self._ending = False
        self._drain_until_s: float | None = None

    def run(self) -> int:
        """Raises DiptychError when the engine cannot start; else returns the exit status."""
        self._host.open()
        try:
            if self._boot.api_target is not None:
                fds = [fd for fd in (self._boot.listen_fd, self._boot.meters_fd) if fd is not None]
                for _ in range(self._boot.num_apis):
                    self._host.children.prepare_api(self._boot.api_target, fds)
            if self._hosts is not None:
                _log.info("hosts may join at %s", self._hosts.endpoint)
                self._starter.tell(Listening(self._hosts.endpoint, str(self._host.run_dir)))
                fd = self._host.lifeline_fd
                self._host.companion = ray_companion(self._boot, self._hosts.endpoint, fd)
            workers = len(self._host.layout.workers)
            self._progress(f"starting {workers} workers, loading the model")
            while not self._ending:
                self._turn()
            if self._drain_until_s is not None:
                self._let_exit()
            return 0
        finally:
            self._ending = True
            if self._hosts is not None:
                self._hosts.close()
            self._host.close()

    def _turn(self) -> None:
        others = [] if self._hosts is None else list[object](self._hosts.sockets())
        others += self._starter.fds
        ready = self._host.wait(TICK_S, others)  # type: ignore[arg-type]
        if any(fd in ready for fd in self._starter.fds):
            self._ending = True  # it says nothing: its end is the only news
        for _ in range(self._host.take_signals()):
            self._asked_to_end()
        now = time.monotonic()
        for event in self._host.events():
            self._take_event(HOME, event, now)
        for news in [] if self._hosts is None else self._hosts.turn(now):
            self._take_news(news, now)
        for message in self._host.channels.receive(0):
            self._take_message(message, now)
        self._fleet.beats(self._read_pulses(), now)
        self._fleet.tick(now)
        self._carry_out()
        self._host.write_table(self._fleet.states())
        self._announce_start()
        self._check_launcher()
        self._check_drain(now)

    # ---- hearing

    def _take_message(self, message: AnyMessage, now: float) -> None:
        """Of a process of any host."""
        match message:
            case Ready(name, epoch, endpoint):
                for address, _ in self._fleet.states():
                    if (process_name(address), address.epoch) == (name, epoch):
                        self._introductions.introduce(address, endpoint)
                        self._fleet.ready(address, now)
            case Stuck(peer):
                self._fleet.stuck(peer, now)
            case Cut(sender, peer):
                self._fleet.cut(sender, peer, now)
            case Grow(scheduler_epoch, count):
                self._fleet.grow(scheduler_epoch, count)
            case Retire(scheduler_epoch, worker, epoch, wanted):
                address = Address("worker", worker, epoch)
                self._fleet.retire(scheduler_epoch, address, now, wanted)
            case AskPage(scheduler_epoch, pool) if self._hosts is not None:
                self._hosts.read_page(scheduler_epoch, pool)

    def _take_news(self, news: HostNews, now: float) -> None:
        """Of other hosts."""
        match news:
            case HostJoined(host, workers, apis):
                layout = self._host.layout
                pools = sorted({spec.pool for spec in workers})
                ups = [PoolUp(pool, layout.num_blocks, layout.block_size) for pool in pools]
                self._fleet.join(host, workers, ups, apis)
                self._progress(f"host {host} joined with {len(workers)} workers")
            case HostLost(host, reason):
                _log.warning("host %d is gone: %s", host, reason)
                gone = self._fleet.leave(host)
                for address in gone:
                    self._host.table.exited(address)
                self._introductions.forget(gone)
            case HostEvent(host, event):
                if isinstance(event, ProcessStarted):
                    self._host.table.started(event.address, event.pid)
                elif isinstance(event, ProcessExited):
                    self._host.table.exited(event.address)
                self._take_event(host, event, now)
            case HostHeard(message):
                self._take_message(message, now)
            case PageRows():
                for scheduler in self._fleet.up("scheduler"):
                    self._host.channels.send_to(scheduler, news)

    def _asked_to_end(self) -> None:
        now = time.monotonic()
        serving = self._fleet.up("api") if self._boot.api_target is not None else []
        if self._drain_until_s is not None or not serving:
            self._ending = True
            return
        grace_s = self._boot.grace_s
        _log.info("draining: open requests have %g s; once more to end now", grace_s)
        self._drain_until_s = now + grace_s + EXIT_S_MAX
        self._fleet.drain()
        for address in serving:
            self._post(Send(address, Drain(grace_s)))

    def _check_drain(self, now: float) -> None:
        if self._drain_until_s is None:
            return
        if self._fleet.apis_gone() or now > self._drain_until_s:
            self._ending = True

    def _take_event(self, host: int, event: LauncherEvent, now: float) -> None:
        match event:
            case ModelReady(info, import_s, weights_s):
                if self._info is None:
                    self._info = msgspec.structs.replace(
                        info, model_path=self._boot.options.model.path
                    )
                if self._hosts is not None and host == HOME:
                    self._hosts.agree(info)
                self._bar.clear()
                self._fleet.model_ready(host, import_s, weights_s)
                self._progress(f"model loaded: {info.dtype}, {info.num_blocks} blocks of KV")
            case ModelLoading(done_bytes, total_bytes) if host == HOME:
                self._bar.show(done_bytes, total_bytes, now)
            case ModelLost():
                self._fleet.model_lost(host)
            case ModelFailed(kind, message):
                if self._info is None:
                    raise _ERRORS.get(kind, EngineDeadError)(message)
                _log.error("the model cannot be loaded again: %s", message)
            case ProcessStarted(address):
                self._fleet.started(address, now)
            case ProcessExited(address, cause, how):
                if not self._ending:
                    quiet = self._drain_until_s is not None or self._fleet.leaves(address)
                    level = logging.INFO if quiet else logging.WARNING
                    _log.log(level, "%s.%d ended: %s", process_name(address), address.epoch, how)
                self._introductions.forget([address])
                self._fleet.exited(address, cause, now)

    def _read_pulses(self) -> dict[Address, int]:
        readings = self._host.pulses(self._fleet.watched())
        return readings if self._hosts is None else readings | self._hosts.pulses()

    # ---- Ray

    def _check_launcher(self) -> None:
        """Before it was up once, an engine whose launcher cannot work never will be."""
        companion = self._host.companion
        if companion is None or self._starter.started:
            return
        if companion.failures >= LAUNCHES_MAX:
            raise EngineDeadError(f"The {companion.name} ends again and again; see the log above.")

    # ---- acting

    def _carry_out(self) -> None:
        for command in self._fleet.take():
            match command:
                case Start(address):
                    self._start(address)
                case Kill(address, reason):
                    _log.error("%s is killed: %s", process_name(address), reason)
                    self._kill(address)
                case GiveUp(reason):
                    raise EngineDeadError(f"The engine cannot start: {reason}; see the log above.")
                case Send():
                    self._post(command)
                case Places(count) if self._host.companion is not None:
                    self._host.companion.order(count)
                case Dismiss(host) if self._hosts is not None:
                    place = self._hosts.dismiss(host)
                    if place is not None and self._host.companion is not None:
                        self._host.companion.order(given_back=place)
                case Rest() if self._host.launcher is not None:
                    _log.info("no worker is wanted: the weights are let go")
                    self._host.launcher.rest()
                case Wake() if self._host.launcher is not None:
                    _log.info("a worker is wanted: loading the model")
                    self._host.launcher.wake()

    def _post(self, send: Send) -> None:
        """To a process of any host."""
        host, message = self._fleet.host_of(send.to), send.message
        if host == HOME or self._hosts is None:
            self._host.channels.send(send)
        else:
            assert isinstance(message, SchedulerUp | SchedulerDown | Drain)
            self._hosts.forward(host, Forward(send.to, message))

    def _start(self, address: Address) -> None:
        match address.kind:
            case "worker":
                host = self._fleet.host_of(address)
                if host != HOME and self._hosts is not None:
                    self._hosts.start(host, address)
                elif self._host.launcher is not None:
                    self._host.launcher.start(address)
            case "scheduler":
                pid = self._host.children.start_scheduler(address)
                self._host.table.started(address, pid)
            case _ if (host := self._fleet.host_of(address)) != HOME and self._hosts is not None:
                assert self._boot.api_target is not None
                assert self._info is not None
                order = StartApi(
                    address,
                    self._boot.api_target,
                    self._info,
                    self._boot.settings,
                    self._salt_key,
                )
                self._hosts.start_api(host, order)
            case _:
                target = self._boot.api_target
                assert target is not None
                boot = ApiProcessBoot(
                    target=target, lifeline_fd=self._host.lifeline_fd, api=self._api_boot(address)
                )
                self._host.table.started(address, self._host.children.start_api(address, boot))

    def _kill(self, address: Address) -> None:
        host = self._fleet.host_of(address)
        if host != HOME and self._hosts is not None:
            self._hosts.kill(host, address)
            return
        if self._host.launcher is not None:
            self._host.launcher.kill(address)
        self._host.children.kill(address)

    def _api_boot(self, address: Address) -> ApiBoot:
        assert self._info is not None
        return ApiBoot(
            run_dir=str(self._host.run_dir),
            api=address.number,
            api_epoch=address.epoch,
            info=self._info,
            settings=self._boot.settings,
            listen_fd=self._boot.listen_fd,
            network=None if self._boot.cluster is None else self._boot.cluster.network,
            meters_fd=self._boot.meters_fd,
            salt_key=self._salt_key,
            log_level=self._boot.log_level,
        )

    def _announce_start(self) -> None:
        if self._starter.started or not self._fleet.engine_up():
            return
        running = {address.number for address in self._fleet.up("worker")}
        workers = ", ".join(
            f"{spec.worker} (dial {spec.dial}"
            + (f", {spec.num_ranks} ranks)" if spec.num_ranks > 1 else ")")
            for spec in self._fleet.specs()
            if spec.worker in running
        )
        self._progress(f"engine up: workers {workers}")
        if self._boot.api_target is None:
            self._starter.tell(Started(self._api_boot(Address("api", 0, 1))))
        self._starter.started = True

    def _progress(self, text: str) -> None:
        _log.info("%s", text)
        self._starter.tell(Progressed(text, str(self._host.run_dir)))

    # ---- ending

    def _let_exit(self) -> None:
        """After a drain nothing runs any more: all may leave by themselves."""
        for kind in ("worker", "scheduler"):
            for address in self._fleet.up(kind):
                if self._fleet.host_of(address) == HOME:
                    self._host.channels.send_to(address, Drain(0.0))
        self._host.wait_for_exits(EXIT_S_MAX)
