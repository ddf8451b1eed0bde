"""The head's view of all other hosts: who joined, what they say, and when one is lost.

Owns the link, the numbers of hosts, workers and pools (never given twice), and the directory of who
listens where. Invariant: a host is lost at the first sign that something between it and the head
is missing; what it says afterwards is answered with `Refused`, and changes nothing.
"""

import logging
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

import msgspec
import zmq

from diptych import __version__
from diptych.engine.core.config import EngineOptions, WorkerSpec
from diptych.engine.core.messages import Address, PageRows, Peers
from diptych.server.boot import ClusterBoot
from diptych.server.client import EngineInfo
from diptych.server.cluster_link import BEAT_S, HeadLink, LinkLost
from diptych.server.launcher import (
    LauncherEvent,
    ModelFailed,
    ModelLost,
    ModelReady,
    ProcessExited,
    ProcessStarted,
)
from diptych.server.link_wire import (
    Directory,
    Forward,
    FromAgent,
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

SILENCE_S_MAX: Final = 3.0
"""A host that says nothing for so long is lost."""
BROKEN_SILENCE_S_MAX: Final = 0.75
"""The same just after some connection broke."""
HOSTS_MAX: Final = 1024
WORKERS_OF_HOST_MAX: Final = 64

_log = logging.getLogger("diptych")


@dataclass(slots=True, eq=False)
class RemoteHost:
    number: int
    ip: str
    place: str
    link: bytes
    workers: list[WorkerSpec]
    heard_at_s: float
    pulses: dict[Address, int] = field(default_factory=dict)


class HostJoined(msgspec.Struct, frozen=True):
    host: int
    workers: list[WorkerSpec]
    apis: list[int]


class HostLost(msgspec.Struct, frozen=True):
    host: int
    reason: str


class HostEvent(msgspec.Struct, frozen=True):
    """What the launcher of that host tells."""

    host: int
    event: LauncherEvent


HostNews = HostJoined | HostLost | HostEvent | HostHeard | PageRows


class RemoteHosts:
    """`options` are the head's own: other hosts get them with their own counts. `num_apis`: API
    servers of the head, None if no other host may have one."""

    def __init__(
        self, cluster: ClusterBoot, options: EngineOptions, log_level: str, num_apis: int | None
    ) -> None:
        self._link = HeadLink(cluster.network, cluster.port)
        self.endpoint = self._link.endpoint
        self.transfer_key = secrets.token_hex(32)
        self._options = options
        self._log_level = log_level
        own = options.workers() if cluster.local_workers else []
        self._next_worker = len(own)
        self._next_pool = len({spec.pool for spec in own})
        self._next_host = 1
        self._next_api = num_apis
        self._hosts: dict[int, RemoteHost] = {}
        self._by_link: dict[bytes, RemoteHost] = {}
        self._endpoints: dict[Address, str] = {}
        self._info: EngineInfo | None = None
        self._beat_at_s = 0.0
        self._broke_at_s = 0.0
        self._news: list[HostNews] = []

    def __len__(self) -> int:
        return len(self._hosts)

    def sockets(self) -> "list[zmq.Socket[bytes]]":
        return self._link.sockets()

    # ---- hearing

    def turn(self, now: float) -> list[HostNews]:
        """What is new, in order."""
        if self._link.broke():
            self._broke_at_s = now
        for link, packet in self._link.receive():
            host = self._by_link.get(link)
            if isinstance(packet, Hello) and host is None:
                self._welcome(link, packet, now)
            elif host is None:
                self._refuse(link, "this host was taken for lost", again=True)
            elif isinstance(packet, LinkLost):
                self._lose(host, str(packet), again=True)
            else:
                host.heard_at_s = now
                self._hear(host, packet)
        for host in list(self._hosts.values()):
            broken = host.heard_at_s < self._broke_at_s
            silent_s = now - (self._broke_at_s if broken else host.heard_at_s)
            if silent_s > (BROKEN_SILENCE_S_MAX if broken else SILENCE_S_MAX):
                self._lose(host, f"nothing was heard for {now - host.heard_at_s:.1f} s", again=True)
        if now - self._beat_at_s >= BEAT_S:
            self._beat_at_s = now
            for host in list(self._hosts.values()):
                self._send(host, HeadBeat())
        news, self._news = self._news, []
        return news

    def pulses(self) -> dict[Address, int]:
        """Read anew since the last call; so that a stale reading is never taken for a hang."""
        readings: dict[Address, int] = {}
        for host in self._hosts.values():
            readings |= host.pulses
            host.pulses = {}
        return readings

    def _welcome(self, link: bytes, hello: Hello, now: float) -> None:
        counts = (hello.prefill, hello.decode, hello.mixed)
        if hello.version != __version__:
            reason = f"the head is diptych {__version__}, this host {hello.version}"
            self._refuse(link, reason, again=False)
            return
        has_api = hello.api and self._next_api is not None
        if min(counts) < 0 or not 0 < sum(counts) + has_api <= WORKERS_OF_HOST_MAX:
            reason = f"a host brings 1 to {WORKERS_OF_HOST_MAX} workers, or an API server"
            self._refuse(link, reason, again=False)
            return
        if len(self._hosts) >= HOSTS_MAX:
            self._refuse(link, f"there are {HOSTS_MAX} hosts already", again=True)
            return
        for older in [h for h in self._hosts.values() if hello.place and h.place == hello.place]:
            self._lose(older, "another host takes its place", again=False)
        options = msgspec.structs.replace(
            self._options,
            scheduler=msgspec.structs.replace(self._options.scheduler, autoscale=None),
            prefill=hello.prefill,
            decode=hello.decode,
            mixed=hello.mixed,
        )
        workers = [
            msgspec.structs.replace(
                spec, worker=self._next_worker + spec.worker, pool=self._next_pool + spec.pool
            )
            for spec in options.workers()
        ]
        host = RemoteHost(self._next_host, hello.ip, hello.place, link, workers, now)
        self._next_host += 1
        self._next_worker += len(workers)
        self._next_pool = max((spec.pool + 1 for spec in workers), default=self._next_pool)
        apis = []
        if has_api and self._next_api is not None:
            apis = [self._next_api]
            self._next_api += 1
        self._hosts[host.number] = self._by_link[link] = host
        self._send(host, Welcome(options, workers, self.transfer_key, self._log_level))
        self._send(host, Directory(self.directory()))
        self._news.append(HostJoined(host.number, workers, apis))

    def _hear(self, host: RemoteHost, packet: FromAgent) -> None:
        event: LauncherEvent
        match packet:
            case HostBeat(pulses):
                host.pulses = dict(pulses)
                return
            case HostHeard():
                self._news.append(packet)
                return
            case HostPage(rows):
                self._news.append(rows)
                return
            case Leaving():
                self._drop(host, "it left")
                return
            case HostModel(None):
                event = ModelLost()
            case HostModel(info):
                assert info is not None
                if not self._is_same_model(host, info):
                    return
                event = ModelReady(info)
            case HostModelFailed(kind, message):
                event = ModelFailed(kind, f"on the host {host.ip}: {message}")
            case HostStarted(address, pid):
                event = ProcessStarted(address, pid)
            case HostExited(address, cause, how):
                event = ProcessExited(address, cause, how)
            case _:
                self._lose(host, "it does not keep to the protocol", again=False)
                return
        self._news.append(HostEvent(host.number, event))

    def _is_same_model(self, host: RemoteHost, info: EngineInfo) -> bool:
        """All hosts must compute the same: else tokens would depend on where they are computed."""
        known = msgspec.structs.replace(info, model_path="")
        if self._info is None:
            self._info = known
        if known == self._info:
            return True
        pairs = zip(msgspec.structs.astuple(known), msgspec.structs.astuple(self._info))
        names = [n for n, (a, b) in zip(info.__struct_fields__, pairs) if a != b]
        reason = f"its model differs from that of the first host in {', '.join(names)}"
        self._lose(host, reason, again=False)
        return False

    def agree(self, info: EngineInfo) -> None:
        """What the head's own workers serve; before any other host is ready."""
        self._info = msgspec.structs.replace(info, model_path="")

    # ---- telling

    def start(self, host: int, address: Address) -> None:
        self._tell(host, StartWorker(address))

    def start_api(self, host: int, order: StartApi) -> None:
        self._tell(host, order)

    def kill(self, host: int, address: Address) -> None:
        self._tell(host, KillProcess(address))

    def forward(self, host: int, packet: Forward) -> None:
        self._tell(host, packet)

    def read_page(self, scheduler_epoch: int, pool: int) -> None:
        """Answered by `PageRows`, unless the host is lost."""
        for host in self._hosts.values():
            if any(spec.pool == pool for spec in host.workers):
                self._send(host, ReadPage(scheduler_epoch, pool))
                return

    def publish(self, up: list[tuple[Address, str]], down: Iterable[Address]) -> Peers:
        """Takes over who listens where, and tells all hosts; returns it for the head's own."""
        for address in down:
            self._endpoints.pop(address, None)
        self._endpoints |= dict(up)
        news = Peers(up, list(down))
        for host in list(self._hosts.values()):
            self._send(host, Directory(news))
        return news

    def directory(self) -> Peers:
        return Peers(list(self._endpoints.items()), [])

    def dismiss(self, host: int) -> str | None:
        """Nothing of it is wanted any more; returns its place."""
        known = self._hosts.get(host)
        if known is None:
            return None
        self._lose(known, "its worker is not wanted any more", again=False)
        return known.place

    def close(self) -> None:
        for host in self._hosts.values():
            self._link.send(host.link, Refused("the server ended", again=False))
        self._link.close(linger_ms=500)

    def _tell(self, host: int, packet: StartWorker | StartApi | KillProcess | Forward) -> None:
        known = self._hosts.get(host)
        if known is not None:
            self._send(known, packet)

    def _send(self, host: RemoteHost, packet: msgspec.Struct) -> None:
        if not self._link.send(host.link, packet) and host.number in self._hosts:  # type: ignore[arg-type]
            self._drop(host, "it does not read any more")

    def _refuse(self, link: bytes, reason: str, *, again: bool) -> None:
        self._link.send(link, Refused(reason, again))
        self._link.forget(link)

    def _lose(self, host: RemoteHost, reason: str, *, again: bool) -> None:
        self._link.send(host.link, Refused(reason, again))
        self._drop(host, reason)

    def _drop(self, host: RemoteHost, reason: str) -> None:
        del self._hosts[host.number]
        del self._by_link[host.link]
        self._link.forget(host.link)
        self._news.append(HostLost(host.number, reason))
