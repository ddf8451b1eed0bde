"""What the head and the supervisor of another host (its agent) say to each other.

Owns the packets. Every packet is numbered, so that one that was lost with a broken connection is
noticed: the host is then treated as lost. Invariant: no key travels in a packet in clear; all of
them go over CURVE.
"""

import msgspec

from diptych.engine.core.config import EngineOptions, WorkerSpec
from diptych.engine.core.messages import (
    Address,
    Cut,
    Drain,
    PageRows,
    Peers,
    Ready,
    SchedulerDown,
    SchedulerUp,
    Stuck,
)
from diptych.engine.core.types import DownCause, Epoch, PoolId
from diptych.server.client import EngineInfo

PACKET_BYTES_MAX = 256 << 20
PACKETS_MAX = 65_536
"""Waiting on a link; a host that lets so many wait is lost."""


class Packet(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of the packets."""


# ---- agent -> head


class Hello(Packet, frozen=True):
    """May I join? `place` is what the launcher calls this host's part; "" if nobody planned it.

    A second host with the same place replaces the first.
    """

    version: str
    ip: str
    place: str
    prefill: int
    decode: int
    mixed: int
    api: bool  # it wants to run an API server as well


class HostBeat(Packet, frozen=True):
    """Alive; and the progress counters of its workers that are up."""

    pulses: list[tuple[Address, int]]


class HostModel(Packet, frozen=True):
    """Weights are loaded there: workers can be started. None: not until the next one."""

    info: EngineInfo | None


class HostModelFailed(Packet, frozen=True):
    kind: str  # name of the DiptychError
    message: str


class HostStarted(Packet, frozen=True):
    address: Address
    pid: int


class HostExited(Packet, frozen=True):
    """The worker's whole process group is gone."""

    address: Address
    cause: DownCause
    how: str


class HostHeard(Packet, frozen=True):
    """What a process there told its supervisor."""

    message: Ready | Stuck | Cut


class HostPage(Packet, frozen=True):
    rows: PageRows


class Leaving(Packet, frozen=True):
    """An orderly end: all processes there are gone."""


FromAgent = (
    Hello
    | HostBeat
    | HostModel
    | HostModelFailed
    | HostStarted
    | HostExited
    | HostHeard
    | HostPage
    | Leaving
)

# ---- head -> agent


class Welcome(Packet, frozen=True):
    """Be this host. `options` holds the counts of this host only; `workers` their global ids."""

    options: EngineOptions
    workers: list[WorkerSpec]
    transfer_key: str
    log_level: str


class Refused(Packet, frozen=True):
    """No, or no more: everything on the host ends. `again`: it may say `Hello` anew."""

    reason: str
    again: bool


class HeadBeat(Packet, frozen=True):
    """Alive."""


class StartWorker(Packet, frozen=True):
    address: Address


class StartApi(Packet, frozen=True):
    """`settings`: the head's; where it listens is the host's own affair."""

    address: Address
    target: str
    info: EngineInfo
    settings: dict[str, object]
    salt_key: str


class KillProcess(Packet, frozen=True):
    address: Address


class Forward(Packet, frozen=True):
    """To a process of the host, from the head's supervisor."""

    address: Address
    message: SchedulerUp | SchedulerDown | Drain


class ReadPage(Packet, frozen=True):
    scheduler_epoch: Epoch
    pool: PoolId


class Directory(Packet, frozen=True):
    """For the processes of the host."""

    news: Peers


FromHead = (
    Welcome
    | Refused
    | HeadBeat
    | StartWorker
    | StartApi
    | KillProcess
    | Forward
    | ReadPage
    | Directory
)
