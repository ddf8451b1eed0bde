"""The supervisor of one host: holds the memory, starts, watches, fences, announces. No torch.

Owns the shared memory, the run directory, the lifeline and all processes. `Fleet` decides; this
shell only carries out. Invariant: when it ends, in whatever way, everything that it started ends
and nothing of it is left.
"""

import logging
import os
import secrets
import signal
import socket
import time
from contextlib import suppress
from typing import Final

import msgspec
import zmq

from diptych.engine.core.errors import ConfigError, DiptychError, EngineDeadError, ModelLoadError
from diptych.engine.core.messages import Address, Drain, PoolUp, Ready, Send, Stuck
from diptych.engine.core.model_config import load_model_config
from diptych.server.boot import (
    ApiBoot,
    ApiProcessBoot,
    HostBoot,
    HostLayout,
    PoolLayout,
    SupervisorBoot,
)
from diptych.server.children import Children
from diptych.server.client import EngineInfo
from diptych.server.cpu_cores import host_cores
from diptych.server.fleet import Fleet, GiveUp, Kill, Start
from diptych.server.launcher import (
    Launcher,
    LauncherEvent,
    ModelFailed,
    ModelLost,
    ModelReady,
    ProcessExited,
    ProcessStarted,
)
from diptych.server.lifeline import adopt_orphans, name_process
from diptych.server.logs import configure_logs
from diptych.server.process_table import ProcessTable
from diptych.server.run_dir import create_run_dir, remove_run_dir
from diptych.server.status import Progressed, Started, Status
from diptych.server.warm_launcher import WarmLauncher
from diptych.transfer.channels import SUPERVISOR, Channels, process_name
from diptych.transfer.control_page import page_bytes
from diptych.transfer.core_table import CoreTable
from diptych.transfer.nixl_wire import require_nixl
from diptych.transfer.shared_memory import create_memory

TICK_S: Final = 0.1
EXIT_S_MAX: Final = 1.0  # for an orderly exit after a drain
KILL_S_MAX: Final = 5.0  # for SIGKILL to do its work
_SIGNALS: Final = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT)
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
        layout = plan_layout(boot)  # first, so that a bad model costs nothing
        self._run_dir, self._lock_fd = create_run_dir()
        try:
            self._channels = Channels(self._run_dir, SUPERVISOR)
        except ConfigError:
            remove_run_dir(self._run_dir)
            raise
        self._lifeline_read, self._lifeline_write = os.pipe2(os.O_CLOEXEC)
        self._host = HostBoot(
            run_dir=str(self._run_dir),
            options=boot.options,
            layout=layout,
            lifeline_fd=self._lifeline_read,
            transfer_key=secrets.token_hex(32),
            log_level=boot.log_level,
        )
        self._pages = {pool.pool: layout.map_page(pool.pool) for pool in layout.pools}
        self._cores = CoreTable(layout.map_cores())
        for spec in boot.options.workers():
            self._cores.introduce(spec.worker, spec.dial)
        self._pool_of = {spec.worker: spec.pool for spec in boot.options.workers()}
        self._control = (
            socket.socket(fileno=boot.control_fd) if boot.control_fd is not None else None
        )
        self._fleet = Fleet(
            boot.options.workers(),
            num_apis=boot.num_apis,
            external_api=boot.api_target is None,
            pools=[PoolUp(p.pool, layout.num_blocks, layout.block_size) for p in layout.pools],
            hang_s=boot.options.hang_s,
        )
        self._table = ProcessTable(self._run_dir)
        self._salt_key = secrets.token_hex(32)
        self._info: EngineInfo | None = None
        self._started = False
        self._ending = False
        self._drain_until_s: float | None = None
        self._signal_read, self._signal_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def run(self) -> int:
        """Raises DiptychError when the engine cannot start; else returns the exit status."""
        adopt_orphans()
        previous = [signal.signal(number, lambda *_: None) for number in _SIGNALS]
        previous_fd = signal.set_wakeup_fd(self._signal_write)
        self._children = Children(self._host)
        self._launcher: Launcher = WarmLauncher(self._host)
        try:
            if self._boot.api_target is not None:
                fds = [fd for fd in (self._boot.listen_fd, self._boot.meters_fd) if fd is not None]
                for _ in range(self._boot.num_apis):
                    self._children.prepare_api(self._boot.api_target, fds)
            self._progress(f"starting {self._host.layout.num_workers} workers, loading the model")
            while not self._ending:
                self._turn()
            if self._drain_until_s is not None:
                self._let_exit()
            return 0
        finally:
            self._end_everything()
            signal.set_wakeup_fd(previous_fd)
            for number, handler in zip(_SIGNALS, previous, strict=True):
                signal.signal(number, handler)

    def _turn(self) -> None:
        self._wait(TICK_S)
        self._take_signals()
        self._take_events()
        now = time.monotonic()
        for message in self._channels.receive(0):
            if isinstance(message, Ready):
                for address, _ in self._fleet.states():
                    if (process_name(address), address.epoch) == (message.name, message.epoch):
                        self._fleet.ready(address, now)
            elif isinstance(message, Stuck):
                self._fleet.stuck(message.peer, now)
        self._fleet.beats(self._read_pulses(), now)
        self._fleet.tick(now)
        self._carry_out()
        self._table.update(self._fleet.states(), self._launcher_pids())
        self._announce_start()
        self._check_drain(now)

    # ---- hearing

    def _wait(self, timeout_s: float) -> None:
        poller = zmq.Poller()
        poller.register(self._channels.inbox, zmq.POLLIN)
        fds = [self._signal_read, *self._launcher.fds(), *self._children.fds()]
        if self._control is not None:
            fds.append(self._control.fileno())
        for fd in fds:
            poller.register(fd, zmq.POLLIN)
        ready = dict(poller.poll(round(timeout_s * 1000)))
        if self._control is not None and self._control.fileno() in ready:
            self._ending = True  # it says nothing: its end is the only news

    def _take_signals(self) -> None:
        with suppress(BlockingIOError):
            for number in os.read(self._signal_read, 4096):
                if number in (signal.SIGTERM, signal.SIGINT):
                    self._asked_to_end()
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                self._children.reaped(*ended)
                self._launcher.reaped(*ended)

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
            self._channels.send_to(address, Drain(grace_s))

    def _check_drain(self, now: float) -> None:
        if self._drain_until_s is None:
            return
        if self._fleet.apis_gone() or now > self._drain_until_s:
            self._ending = True

    def _take_events(self) -> None:
        now = time.monotonic()
        for event in [*self._launcher.events(now), *self._children.events(now)]:
            self._take_event(event, now)

    def _take_event(self, event: LauncherEvent, now: float) -> None:
        match event:
            case ModelReady(info):
                self._info = info
                self._fleet.model_ready()
                self._progress(f"model loaded: {info.dtype}, {info.num_blocks} blocks of KV")
            case ModelLost():
                self._fleet.model_lost()
            case ModelFailed(kind, message):
                if self._info is None:
                    raise _ERRORS.get(kind, EngineDeadError)(message)
                _log.error("the model cannot be loaded again: %s", message)
            case ProcessStarted(address, pid):
                self._table.started(address, pid)
            case ProcessExited(address, cause, how):
                if not self._ending:
                    level = logging.INFO if self._drain_until_s is not None else logging.WARNING
                    _log.log(level, "%s.%d ended: %s", process_name(address), address.epoch, how)
                self._table.exited(address)
                if address.kind == "worker":
                    self._cores.rest(address.number)
                self._fleet.exited(address, cause, now)

    def _read_pulses(self) -> dict[Address, int]:
        readings = {
            address: self._pages[self._pool_of[address.number]].pulse(address.number).counter
            for address in self._fleet.up("worker")
        }
        slot = self._host.layout.num_workers
        for address in self._fleet.up("scheduler"):
            readings[address] = self._pages[0].pulse(slot).counter
        return readings

    # ---- acting

    def _carry_out(self) -> None:
        for command in self._fleet.take():
            match command:
                case Start(address):
                    self._start(address)
                case Kill(address, reason):
                    _log.error("%s is killed: %s", process_name(address), reason)
                    self._launcher.kill(address)
                    self._children.kill(address)
                case GiveUp(reason):
                    raise EngineDeadError(f"The engine cannot start: {reason}; see the log above.")
                case Send():
                    self._channels.send(command)

    def _start(self, address: Address) -> None:
        match address.kind:
            case "worker":
                self._launcher.start(address)
            case "scheduler":
                self._table.started(address, self._children.start_scheduler(address))
            case _:
                target = self._boot.api_target
                assert target is not None
                boot = ApiProcessBoot(
                    target=target, lifeline_fd=self._lifeline_read, api=self._api_boot(address)
                )
                self._table.started(address, self._children.start_api(address, boot))

    def _api_boot(self, address: Address) -> ApiBoot:
        assert self._info is not None
        return ApiBoot(
            run_dir=str(self._run_dir),
            api=address.number,
            api_epoch=address.epoch,
            info=self._info,
            settings=self._boot.settings,
            listen_fd=self._boot.listen_fd,
            meters_fd=self._boot.meters_fd,
            salt_key=self._salt_key,
            log_level=self._boot.log_level,
        )

    def _announce_start(self) -> None:
        if self._started or not self._fleet.engine_up():
            return
        workers = ", ".join(
            f"{spec.worker} (dial {spec.dial})" for spec in self._boot.options.workers()
        )
        self._progress(f"engine up: workers {workers}")
        if self._boot.api_target is None:
            self._tell(Started(self._api_boot(Address("api", 0, 1))))
        self._started = True  # from here the starter hears nothing but the end

    def _progress(self, text: str) -> None:
        _log.info("%s", text)
        if not self._started:
            self._tell(Progressed(text, str(self._run_dir)))

    def _tell(self, status: Status) -> None:
        if self._control is not None:
            with suppress(OSError):  # the starter is gone, which ends this process anyway
                self._control.send(msgspec.json.encode(status), socket.MSG_DONTWAIT)

    def _launcher_pids(self) -> dict[str, int]:
        pid = getattr(self._launcher, "warm_pid", None)
        return {} if pid is None else {"warm": pid}

    # ---- ending

    def _let_exit(self) -> None:
        """After a drain nothing runs any more: all may leave by themselves."""
        for kind in ("worker", "scheduler"):
            for address in self._fleet.up(kind):
                self._channels.send_to(address, Drain(0.0))
        self._wait_for_exits(EXIT_S_MAX)

    def _end_everything(self) -> None:
        self._ending = True
        self._launcher.close()
        self._children.close()
        self._wait_for_exits(KILL_S_MAX)
        self._channels.close()
        for fd in (
            self._lifeline_write,
            self._lifeline_read,
            self._signal_read,
            self._signal_write,
            *self._host.layout.fds,
        ):
            os.close(fd)
        remove_run_dir(self._run_dir)
        os.close(self._lock_fd)

    def _wait_for_exits(self, timeout_s: float) -> None:
        """Until every child, and every worker adopted from the warm parent, was reaped."""
        until_s = time.monotonic() + timeout_s
        while time.monotonic() < until_s:
            if not self._launcher.num_running() + self._children.num_running():
                return
            self._wait(TICK_S)
            self._take_signals()
            self._take_events()


def plan_layout(boot: SupervisorBoot) -> HostLayout:
    """Sizes the memory from the model's configuration alone, and creates it."""
    options = boot.options
    if options.transfer == "nixl":
        require_nixl()
    model, cache = options.model, options.cache
    config = load_model_config(model.path, model.dtype, model.max_model_len)
    block_bytes = config.block_bytes(cache.block_size)
    num_blocks = cache.blocks(block_bytes)
    workers = options.workers()
    num_workers = len(workers)
    return HostLayout(
        num_blocks=num_blocks,
        block_size=cache.block_size,
        block_bytes=block_bytes,
        num_workers=num_workers,
        pools=[
            PoolLayout(
                pool=pool,
                pool_fd=create_memory(f"pool{pool or ''}", num_blocks * block_bytes),
                page_fd=create_memory(f"page{pool or ''}", page_bytes(num_blocks, num_workers + 1)),
            )
            for pool in sorted({spec.pool for spec in workers})
        ],
        cores=host_cores(options.cpu_cores),
        cores_fd=create_memory("cores", num_workers),
    )
