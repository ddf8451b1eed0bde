"""The supervisor of a further host of a cluster: the head decides, this one carries out here.

Owns its host (host.py) and its end of the link. Invariants: memory that the head took for lost is
never used again, because an agent that comes back is a new one, with new numbers; one that has not
heard from its head for a while, or misses a packet of it, ends with all that runs on its host.
"""

import logging
import os
import secrets
import socket
import sys
import time
from enum import IntEnum
from pathlib import Path
from typing import Final, NoReturn

import msgspec
import zmq

from diptych import __version__
from diptych.engine.core.errors import ConfigError, DiptychError
from diptych.engine.core.messages import Address, AnyMessage, Cut, PageRows, Peers, Ready, Stuck
from diptych.engine.core.types import DownCause
from diptych.engine.hub import resolve_model
from diptych.server.boot import AgentBoot, ApiBoot, ApiProcessBoot
from diptych.server.builtin import BUILTIN_MODEL, BUILTIN_NAME
from diptych.server.cluster_link import BEAT_S, AgentLink, LinkLost
from diptych.server.fleet_members import State
from diptych.server.host import TICK_S, Host
from diptych.server.http.listening import open_socket
from diptych.server.http.settings import HttpSettings
from diptych.server.launcher import (
    ModelFailed,
    ModelLoading,
    ModelLost,
    ModelReady,
    ProcessExited,
    ProcessStarted,
)
from diptych.server.link_wire import (
    Directory,
    Forward,
    FromHead,
    HeadBeat,
    Hello,
    HostBeat,
    HostExited,
    HostHeard,
    HostModel,
    HostModelFailed,
    HostPage,
    HostStarted,
    KillProcess,
    Leaving,
    ReadPage,
    Refused,
    StartApi,
    StartWorker,
    Welcome,
)
from diptych.server.logs import configure_logs
from diptych.transfer.network import Network, public_of
from diptych.transfer.processes import name_process

HEAD_SILENCE_S_MAX: Final = 10.0
"""A head that says nothing for so long is lost, and everything here ends."""
ORPHAN_CHECK_S: Final = 5.0
ANSWER_S_MAX: Final = 0.5
JOIN_S_MAX: Final = 60.0
"""So long a head that does not answer is waited for."""

_log = logging.getLogger("diptych")


class AgentEnd(IntEnum):
    """How an agent ended; also its exit status."""

    DONE = 0  # the head, or whoever started it, ended it
    REFUSED = 1  # it would be refused again
    LOST = 75  # it may join anew


class HostAgent:
    """`run` once; it must have the main thread, for the signals."""

    def __init__(self, boot: AgentBoot) -> None:
        configure_logs("agent", boot.log_level)
        name_process("agent")
        public_of(boot.secret)  # raises ConfigError
        self._boot = boot
        self._ip = boot.ip or own_ip(boot.head)
        self._model = resolve_model(boot.model_path) if boot.model_path else ""  # may take long
        self._link = AgentLink(boot.head, boot.secret, secrets.token_bytes(16))
        self._host: Host | None = None
        self._can_fork = False
        self._states: dict[Address, State] = {}
        self._listener: socket.socket | None = None
        self._directory: dict[Address, str] = {}
        self._heard_at_s = time.monotonic()
        self._beat_at_s = 0.0
        self._orphan_check_s: float | None = None  # set once whoever started it is gone
        self._end: AgentEnd | None = None

    def run(self) -> AgentEnd:
        """Raises ConfigError, ModelLoadError when it cannot serve."""
        boot = self._boot
        counts = (boot.prefill, boot.decode, boot.mixed)
        hello = Hello(__version__, self._ip, boot.place, *counts, boot.api_port is not None)
        try:
            self._link.send(hello)
            while self._end is None:
                self._turn()
        except LinkLost as error:
            _log.error("the link to the head is lost: %s", error)
            self._end = AgentEnd.LOST
        finally:
            if self._host is not None:
                self._host.close()
            if self._listener is not None:
                self._listener.close()
            self._link.close(linger_ms=500)
        return self._end

    def _turn(self) -> None:
        others: list[int | zmq.Socket[bytes]] = list(self._link.sockets())
        if self._boot.lifeline_fd is not None and self._orphan_check_s is None:
            others.append(self._boot.lifeline_fd)
        if self._host is None:
            self._wait_to_join(others)
        else:
            ready = self._host.wait(TICK_S, others)
            ended = self._boot.lifeline_fd in ready and self._must_end()
            if self._host.take_signals() or ended or self._orphan_is_over():
                self._leave()
                return
        for packet in self._link.receive():
            self._heard_at_s = time.monotonic()
            self._obey(packet)
            if self._end is not None:
                return
        if self._host is not None:
            self._report(self._host)
            silent_s = time.monotonic() - self._heard_at_s
            if silent_s > HEAD_SILENCE_S_MAX:
                raise LinkLost(f"nothing was heard for {silent_s:.1f} s")

    def _wait_to_join(self, others: "list[int | zmq.Socket[bytes]]") -> None:
        poller = zmq.Poller()
        for source in others:
            poller.register(source, zmq.POLLIN)
        ready = dict(poller.poll(round(TICK_S * 1000)))
        if self._boot.lifeline_fd in ready:
            self._end = AgentEnd.DONE
        elif self._link.is_refused:
            raise ConfigError(f"{self._boot.head} hangs up: the key is not that of the head")
        elif time.monotonic() - self._heard_at_s > JOIN_S_MAX:
            raise ConfigError(f"no head answers at {self._boot.head}")

    def _must_end(self) -> bool:
        """Whoever started it ended: of its own accord, or because Ray's control process did?"""
        if not self._boot.orphan_of or answers(self._boot.orphan_of):
            return True
        _log.warning("nobody answers at %s: this host goes on by itself", self._boot.orphan_of)
        self._orphan_check_s = time.monotonic() + ORPHAN_CHECK_S
        return False

    def _orphan_is_over(self) -> bool:
        """Somebody answers again: others take over this host's part."""
        now = time.monotonic()
        if self._orphan_check_s is None or now < self._orphan_check_s:
            return False
        self._orphan_check_s = now + ORPHAN_CHECK_S
        return answers(self._boot.orphan_of)

    def _leave(self) -> None:
        """In order: when the head hears of it, nothing runs here any more."""
        assert self._host is not None
        host, self._host = self._host, None
        host.close()
        self._link.send(Leaving())
        self._end = AgentEnd.DONE

    # ---- what the head says

    def _obey(self, packet: FromHead) -> None:
        match packet:
            case HeadBeat():
                return
            case Refused(reason, again):
                _log.info("the head ends this host's part: %s", reason)
                self._end = AgentEnd.LOST if again else AgentEnd.REFUSED
                if self._host is not None and not again:
                    self._end = AgentEnd.DONE
                return
            case Welcome():
                self._open(packet)
                return
        host = self._host
        if host is None:
            raise LinkLost("orders before a welcome")
        match packet:
            case StartWorker(address):
                self._start(host, address)
            case StartApi():
                self._start_api(host, packet)
            case KillProcess(address):
                self._states[address] = State.FENCING
                if host.launcher is not None:
                    host.launcher.kill(address)
                host.children.kill(address)
            case Forward(address, message):
                host.channels.send_to(address, message)
            case ReadPage(scheduler_epoch, pool):
                self._read_page(host, scheduler_epoch, pool)
            case Directory(news):
                self._take_directory(host, news)

    def _open(self, welcome: Welcome) -> None:
        if self._host is not None:
            raise LinkLost("a second welcome")
        configure_logs("agent", welcome.log_level)
        options = welcome.options
        path = self._model or resolve_model(local_model(options.model.path))
        model = msgspec.structs.replace(options.model, path=path)
        try:
            self._host = Host(
                msgspec.structs.replace(options, model=model),
                welcome.workers,
                transfer_key=welcome.transfer_key,
                network=Network(self._ip, self._boot.secret),
                log_level=welcome.log_level,
                devices=self._boot.devices,
            )
        except DiptychError as error:
            self._link.send(HostModelFailed(type(error).__name__, error.message))
            raise
        self._host.open()
        count = len(welcome.workers)
        _log.info("joined %s as %s: %d workers", self._boot.head, self._ip, count)

    def _start(self, host: Host, address: Address) -> None:
        if host.launcher is None or not self._can_fork:  # the news crossed the order
            self._link.send(HostExited(address, DownCause.KILLED, "never forked"))
            return
        self._enter(address)
        host.launcher.start(address)

    def _enter(self, address: Address) -> None:
        """In the place of the incarnation before it."""
        name = (address.kind, address.number)
        self._states = {a: s for a, s in self._states.items() if (a.kind, a.number) != name}
        self._states[address] = State.STARTING

    def _start_api(self, host: Host, order: StartApi) -> None:
        """Raises ConfigError when it cannot listen where it was told to."""
        port = self._boot.api_port
        if port is None:
            raise LinkLost("the head starts an API server that nobody asked for")
        settings = msgspec.convert(order.settings, HttpSettings)
        settings = msgspec.structs.replace(
            settings, host=self._boot.api_host, port=port, num_apis=1
        )
        if self._listener is None:
            self._listener = open_socket(settings)
        port = self._listener.getsockname()[1]
        boot = ApiBoot(
            run_dir=str(host.run_dir),
            api=order.address.number,
            api_epoch=order.address.epoch,
            info=msgspec.structs.replace(order.info, model_path=host.model_path),
            settings=msgspec.to_builtins(msgspec.structs.replace(settings, port=port)),
            listen_fd=self._listener.fileno(),
            salt_key=order.salt_key,
            network=Network(self._ip, self._boot.secret),
            log_level=self._boot.log_level,
        )
        self._enter(order.address)
        process = ApiProcessBoot(target=order.target, lifeline_fd=host.lifeline_fd, api=boot)
        host.table.started(order.address, host.children.start_api(order.address, process))

    def _read_page(self, host: Host, scheduler_epoch: int, pool: int) -> None:
        page = host.page(pool)
        if page is None:
            raise LinkLost(f"the head asks for pool {pool}, which is not here")
        generations, entries = page.read_all()
        rows = [(entry.block, entry.hash, entry.parent) for entry in entries]
        self._link.send(HostPage(PageRows(scheduler_epoch, pool, generations, rows)))

    def _take_directory(self, host: Host, news: Peers) -> None:
        for address in news.down:
            self._directory.pop(address, None)
        self._directory |= dict(news.up)
        for address, state in self._states.items():
            if state is State.UP:
                host.channels.send_to(address, news)

    # ---- what the host says

    def _report(self, host: Host) -> None:
        for event in host.events():
            if not isinstance(event, ModelLoading):  # the head shows its own host's only
                self._link.send(self._packet(event))
        for message in host.channels.receive(0):
            self._hear(host, message)
        host.write_table(list(self._states.items()))
        now = time.monotonic()
        if now - self._beat_at_s >= BEAT_S:
            self._beat_at_s = now
            watched = (State.UP, State.STARTING)
            running = [a for a, state in self._states.items() if state in watched]
            self._link.send(HostBeat(list(host.pulses(running).items())))

    def _packet(
        self, event: ModelReady | ModelLost | ModelFailed | ProcessStarted | ProcessExited
    ) -> HostModel | HostModelFailed | HostStarted | HostExited:
        match event:
            case ModelReady(info):
                self._can_fork = True
                return HostModel(info)
            case ModelLost():
                self._can_fork = False
                return HostModel(None)
            case ModelFailed(kind, message):
                return HostModelFailed(kind, message)
            case ProcessStarted(address, pid):
                return HostStarted(address, pid)
            case ProcessExited(address, cause, how):
                self._states[address] = State.DOWN
                return HostExited(address, cause, how)

    def _hear(self, host: Host, message: AnyMessage) -> None:
        """A process that listens learns first where all others are."""
        if isinstance(message, Ready):
            for address in self._states:
                if (f"{address.kind}{address.number}", address.epoch) == (
                    message.name,
                    message.epoch,
                ):
                    self._states[address] = State.UP
                    host.channels.send_to(address, Peers(list(self._directory.items()), []))
        if isinstance(message, Ready | Stuck | Cut):
            self._link.send(HostHeard(message))


def answers(endpoint: str) -> bool:
    """Somebody listens at HOST:PORT."""
    host, _, port = endpoint.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S_MAX):
            return True
    except (OSError, ValueError):
        return False


def own_ip(head: str) -> str:
    """The address from which this host reaches the head."""
    name, _, port = head.rpartition(":")
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            name.strip("[]"), int(port), type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing
            return str(probe.getsockname()[0])
    except (OSError, ValueError) as error:
        raise ConfigError(f"{head!r} is no address of a head, say HOST:PORT: {error}") from error


def local_model(path: str) -> str:
    """The head's folder of the built-in model is this host's own."""
    is_builtin = Path(path).name == BUILTIN_MODEL.name and not Path(path).exists()
    return str(BUILTIN_MODEL) if is_builtin or path == BUILTIN_NAME else path


def run_agent(boot: AgentBoot) -> AgentEnd:
    """Joins again after the link was lost; returns when there is nothing to join any more."""
    while True:
        end = HostAgent(boot).run()
        if end is not AgentEnd.LOST:
            return end
        _log.info("joining again")


def main() -> NoReturn:
    """`python -m diptych.server.host_agent`, its `AgentBoot` on standard input."""
    boot = msgspec.json.decode(sys.stdin.buffer.read(), type=AgentBoot)
    try:
        status = run_agent(boot)
    except DiptychError as error:
        _log.error("%s", error.message)
        status = AgentEnd.REFUSED
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
