"""What the starter of an engine hears of it, over its control socket: progress, then that it is up.

Owns the socket. Invariant: after `started` nothing is said any more but the end, which is the
socket's own.
"""

import socket
from contextlib import suppress

import msgspec

from diptych.server.status import Status


class Starter:
    """`control_fd` None: the supervisor is the program itself, nobody listens."""

    def __init__(self, control_fd: int | None) -> None:
        self._control = socket.socket(fileno=control_fd) if control_fd is not None else None
        self.started = False

    @property
    def fds(self) -> list[int]:
        """Readable once the starter is gone."""
        return [] if self._control is None else [self._control.fileno()]

    def tell(self, status: Status) -> None:
        if self._control is not None and not self.started:
            with suppress(OSError):  # it is gone, which ends this process anyway
                self._control.send(msgspec.json.encode(status), socket.MSG_DONTWAIT)
