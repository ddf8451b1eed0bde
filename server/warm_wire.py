"""What a supervisor and its warm parent say to each other: msgpack packets over a socket pair."""

import msgspec

from diptych.engine.core.types import Epoch, WorkerId
from diptych.server.boot import HostBoot
from diptych.server.client import EngineInfo

PACKET_BYTES_MAX = 1 << 18


class WarmBoot(msgspec.Struct, frozen=True, kw_only=True):
    host: HostBoot
    socket_fd: int
    spawned_ns: int  # on the host's monotonic clock


class Packet(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of the packets."""


class ForkWorker(Packet, frozen=True):
    """To the warm parent: fork this incarnation."""

    worker: WorkerId
    epoch: Epoch


class Loaded(Packet, frozen=True):
    info: EngineInfo
    import_s: float  # from the start of the process
    weights_s: float


class Loading(Packet, frozen=True):
    """How far it is."""

    done_bytes: int
    total_bytes: int


class LoadFailed(Packet, frozen=True):
    kind: str  # name of the DiptychError
    message: str


class Forked(Packet, frozen=True):
    """Comes with one descriptor: the worker's pidfd. The worker waits until this was sent."""

    worker: WorkerId
    epoch: Epoch
    pid: int


class Reaped(Packet, frozen=True):
    pid: int
    wait_status: int


FromWarm = Loaded | Loading | LoadFailed | Forked | Reaped
