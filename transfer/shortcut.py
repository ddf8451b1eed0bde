"""A datagram socket beside a worker's inbox: one system call, one wake-up, no thread between.

For messages whose order to others does not matter and whose delay a client feels. Owns one socket.
Invariant: a send never blocks and never loses silently: what does not fit, or finds the peer's
short queue full, is refused, and the caller takes the ordinary way.
"""

import select
import socket
from pathlib import Path
from typing import Final

FRAME_BYTES_MAX: Final = 32 << 10


class ShortcutInbox:
    """`inbox` is the path of the process's ordinary one, whose name it extends."""

    def __init__(self, inbox: Path) -> None:
        self._path = _beside(inbox)
        self._socket = _datagram_socket()
        self._socket.bind(self._path)
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        self._buffer = memoryview(bytearray(FRAME_BYTES_MAX))

    def fileno(self) -> int:
        return self._socket.fileno()

    def receive(self) -> memoryview | None:
        """None: nothing waits. The frame is valid until the next call."""
        if not self._poll.poll(0):  # cheaper than an exception
            return None
        return self._buffer[: self._socket.recv_into(self._buffer)]

    def close(self) -> None:
        self._socket.close()
        Path(self._path).unlink(missing_ok=True)


class ShortcutPeer:
    """The way to one incarnation of a peer; if nobody is there, every send is refused."""

    def __init__(self, inbox: Path) -> None:
        self._socket = _datagram_socket()
        self._connected = self._socket.connect_ex(_beside(inbox)) == 0

    def send(self, frame: bytes) -> bool:
        """False: not sent."""
        if not self._connected or len(frame) > FRAME_BYTES_MAX:
            return False
        try:
            self._socket.send(frame)
        except OSError:  # a full queue, or the peer ended
            return False
        return True

    def close(self) -> None:
        self._socket.close()


def _datagram_socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)


def _beside(inbox: Path) -> str:
    return f"{inbox}.s"
