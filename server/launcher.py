"""How a supervisor starts, fences and watches workers: the one interface for every kind of host.

Owns nothing. A launcher turns these verbs into processes (forked from a warm parent here, actors
of a cluster elsewhere) and tells what became of them. Invariant: `ProcessExited` is told only after
the worker's whole process group is gone, so that nothing of it can still write.
"""

from typing import Protocol

import msgspec

from diptych.engine.core.messages import Address
from diptych.engine.core.types import DownCause
from diptych.server.client import EngineInfo


class ModelReady(msgspec.Struct, frozen=True):
    """Weights are loaded; workers can be started."""

    info: EngineInfo
    import_s: float = 0.0  # an interpreter and its imports
    weights_s: float = 0.0  # loading and packing


class ModelLost(msgspec.Struct, frozen=True):
    """No worker can be started until the next ModelReady; those that live are not touched."""


class ModelLoading(msgspec.Struct, frozen=True):
    """Weights are being packed: how far that is."""

    done_bytes: int
    total_bytes: int


class ModelFailed(msgspec.Struct, frozen=True):
    """The model cannot be served: `kind` is the name of the DiptychError."""

    kind: str
    message: str


class ProcessStarted(msgspec.Struct, frozen=True):
    address: Address
    pid: int


class ProcessExited(msgspec.Struct, frozen=True):
    address: Address
    cause: DownCause
    how: str  # for people


LauncherEvent = ModelReady | ModelLost | ModelLoading | ModelFailed | ProcessStarted | ProcessExited


class Launcher(Protocol):
    """Used from one thread; no method blocks."""

    def start(self, address: Address) -> None:
        """Starts this incarnation of a worker. It announces itself when it can serve."""
        ...

    def rest(self) -> None:
        """No worker runs or is wanted: give back what only the next start needs."""
        ...

    def wake(self) -> None:
        """Ends the rest: `ModelReady` follows, then `start`."""
        ...

    def kill(self, address: Address) -> None:
        """Fences it; `ProcessExited` follows. Unknown or gone: nothing happens."""
        ...

    def fds(self) -> list[int]:
        """Descriptors that become readable when `events` may have something new."""
        ...

    def num_running(self) -> int:
        """Workers whose exit was not told yet."""
        ...

    def events(self, now: float) -> list[LauncherEvent]: ...

    def reaped(self, pid: int, wait_status: int) -> None:
        """A child of the supervisor ended that it did not start itself."""
        ...

    def close(self) -> None:
        """Kills everything that was started; `events` goes on telling the exits."""
        ...
