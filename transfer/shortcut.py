"""A datagram socket beside a worker's inbox: one system call, one wake-up, no thread between.

For messages whose order to others does not matter and whose delay a client feels. Owns one unix
socket. Invariant: a send never blocks and never loses silently: what does not fit, or finds the
peer's short queue full, is refused, and the caller takes the ordinary way.
"""

import socket
from contextlib import suppress
from pathlib import Path
from typing import Final

FRAME_BYTES_MAX: Final = 32 << 10


class Shortcut:
    """`path` is that of the process's inbox, whose name it extends."""

    def __init__(self, path: Path) -> None:
        self._path = _beside(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind(self._path)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, frame: bytes, inbox: Path) -> bool:
        """False: not sent."""
        if len(frame) > FRAME_BYTES_MAX:
            return False
        try:
            self._socket.sendto(frame, _beside(inbox))
        except OSError:  # a full queue, or nobody there
            return False
        return True

    def receive(self) -> bytes | None:
        """None: nothing waits."""
        with suppress(BlockingIOError):
            return self._socket.recv(FRAME_BYTES_MAX)
        return None

    def close(self) -> None:
        self._socket.close()
        Path(self._path).unlink(missing_ok=True)


def _beside(inbox: Path) -> str:
    return f"{inbox}.s"
