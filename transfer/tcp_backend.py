"""Reads from pools over TCP: one connection per source, bytes received where they belong.

Owns the connections. All of it runs inside `read` and `poll`, without threads and without waiting:
so a cancel is over at once (what still comes for it goes to a waste buffer). Invariant: answers
come in the order of the requests of a connection; a connection that breaks fails all of its reads.
"""

import errno
import os
import socket
import struct
import time
from collections.abc import Callable, Generator
from typing import Final

from diptych.transfer.backend import POLL_BYTES_MAX
from diptych.transfer.pool_memory import PoolMemory
from diptych.transfer.spans import Read, ReadDone, ReadFailed, own_blocks
from diptych.transfer.tcp_wire import (
    ACCEPTED,
    ANSWER,
    LAYOUT_BYTES,
    NONCE_BYTES,
    REFUSALS,
    encode_request,
    prove,
)

STALL_S_MAX: Final = 5.0
"""A peer that was asked and sends nothing for so long is given up; far above any `hang_s`."""
_WASTE_BYTES: Final = 1 << 20
_DIGEST_BYTES: Final = 256 << 10  # digested as they come, while they are in the cache
_PIECES_MAX: Final = 512  # of one receive; the kernel takes 1,024
_CONNECTING: Final = (errno.EINPROGRESS, errno.EWOULDBLOCK)


class _Broken(Exception):
    """The connection is of no use any more; `lost`, `refused`: nor will another one be."""

    def __init__(self, reason: str, lost: bool = False, refused: bool = False) -> None:
        super().__init__(reason)
        self.lost = lost or refused
        self.refused = refused


class _Connection:
    """The client's end: a script that says which bytes it waits for, and a driver."""

    def __init__(
        self, endpoint: str, own: PoolMemory, key: bytes, layout: bytes, clock: Callable[[], float]
    ) -> None:
        host, _, port = endpoint.rpartition(":")
        self.reads: dict[int, Read | None] = {}  # handle -> None once cancelled
        self.answers: list[ReadDone] = []
        self._own = own
        self._key = key
        self._layout = layout
        self._unsent = b""
        self._requests: list[bytes] = []  # until it is accepted
        self._accepted = False
        self._current: int | None = None  # whose bytes are being received
        self._waste = memoryview(bytearray(_WASTE_BYTES))
        self._clock = clock
        self._heard_at = clock()
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        code = self.socket.connect_ex((host, int(port)))
        self._failure = "" if code in (0, *_CONNECTING) else os.strerror(code)
        self._script = self._converse()
        self._targets = next(self._script)

    @property
    def wants_to_write(self) -> bool:
        return bool(self._unsent)

    @property
    def failed_at_once(self) -> bool:
        return bool(self._failure)

    def request(self, read: Read) -> None:
        if not self.reads:
            self._heard_at = self._clock()
        self.reads[read.handle] = read
        request = encode_request(read.handle, read.spans)
        if self._accepted:
            self._unsent += request
        else:
            self._requests.append(request)

    def cancel(self, handle: int) -> None:
        """Nothing more is received into its blocks."""
        if self.reads.get(handle) is None:
            return
        self.reads[handle] = None
        if self._current == handle:
            self._targets = self._discard(sum(len(target) for target in self._targets))

    def progress(self, bytes_max: int) -> int:
        """Sends and receives what goes without waiting; returns the bytes received."""
        if self._failure:
            raise _Broken(self._failure)
        received = 0
        try:
            self._flush()
            while received < bytes_max:
                count = self.socket.recvmsg_into(self._targets[:_PIECES_MAX])[0]
                if not count:
                    raise _Broken("the peer closed the connection")
                received += count
                self._received(count)
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise _Broken(os.strerror(error.errno or 0)) from error
        self._watch(received)
        return received

    def _flush(self) -> None:
        while self._unsent:
            self._unsent = self._unsent[self.socket.send(self._unsent) :]

    def _watch(self, received: int) -> None:
        """A peer that stands still, or is cut off, ends the connection."""
        if received or not self.reads:
            self._heard_at = self._clock()
        elif self._clock() - self._heard_at > STALL_S_MAX:
            raise _Broken(f"nothing came for {STALL_S_MAX:g} s", lost=True)

    def _received(self, count: int) -> None:
        targets, done = self._targets, 0
        while done < len(targets) and count >= len(targets[done]):
            count -= len(targets[done])
            done += 1
        del targets[:done]
        if count:
            targets[0] = targets[0][count:]
        while not self._targets:
            self._targets = next(self._script)

    def _converse(self) -> Generator[list[memoryview], None, None]:
        nonce = bytearray(NONCE_BYTES)
        yield [memoryview(nonce)]
        self._unsent += prove(self._key, bytes(nonce), self._layout) + self._layout
        self._flush()
        answer = bytearray(1)
        yield [memoryview(answer)]
        if answer[0] != ACCEPTED:
            reason = REFUSALS.get(answer[0], "it speaks another protocol")
            raise _Broken(f"refused: {reason}", refused=True)
        self._accepted = True
        self._unsent += b"".join(self._requests)
        self._flush()
        while True:
            yield from self._answer()

    def _answer(self) -> Generator[list[memoryview], None, None]:
        header = bytearray(ANSWER.size)
        yield [memoryview(header)]
        handle, num_blocks = ANSWER.unpack(header)
        read = self.reads.get(handle)
        if handle not in self.reads:
            raise _Broken("it answers what was not asked")
        self._current = handle
        digests: list[int] = []
        if read is not None and num_blocks != sum(span.count for span in read.spans):
            raise _Broken("it answers another number of blocks")
        if read is None:
            yield self._discard(num_blocks * self._own.block_bytes)
        else:
            blocks = own_blocks(read.spans)
            size = max(1, _DIGEST_BYTES // self._own.block_bytes)
            for start in range(0, num_blocks, size):
                if self.reads[handle] is None:
                    yield self._discard((num_blocks - start) * self._own.block_bytes)
                    break
                group = blocks[start : start + size]
                yield [self._own.blocks(block, 1) for block in group]
                digests += self._own.digests(group)
        self._current = None
        generations = bytearray(8 * num_blocks)
        yield [memoryview(generations)]
        read = self.reads.pop(handle)
        if read is not None:
            seen = list(struct.unpack(f"<{num_blocks}Q", generations))
            self.answers.append(ReadDone(handle, seen, digests))

    def _discard(self, num_bytes: int) -> list[memoryview]:
        """Room for bytes that nobody wants."""
        whole, rest = divmod(num_bytes, _WASTE_BYTES)
        return [self._waste] * whole + [self._waste[:rest]] * bool(rest)


class TcpBackend:
    name = "tcp"

    def __init__(
        self,
        own: PoolMemory,
        key: bytes,
        layout: bytes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert len(layout) == LAYOUT_BYTES
        self._own = own
        self._key = key
        self._layout = layout
        self._clock = clock
        self._connections: dict[str, _Connection] = {}
        self._answers: list[ReadDone | ReadFailed] = []

    @property
    def eager(self) -> bool:
        return bool(self._answers) or any(c.failed_at_once for c in self._connections.values())

    def read(self, read: Read) -> None:
        connection = self._connections.get(read.endpoint)
        if connection is None:
            connection = _Connection(read.endpoint, self._own, self._key, self._layout, self._clock)
            self._connections[read.endpoint] = connection
        connection.request(read)
        self._progress(read.endpoint, connection, 0)

    def poll(self) -> list[ReadDone | ReadFailed]:
        left = POLL_BYTES_MAX
        for endpoint, connection in list(self._connections.items()):
            left -= self._progress(endpoint, connection, left)
        answers, self._answers = self._answers, []
        return answers

    def cancel(self, handle: int) -> None:
        for connection in self._connections.values():
            if connection.reads.get(handle) is not None:
                connection.cancel(handle)
                self._answers.append(ReadFailed(handle, "cancelled"))

    def fds(self) -> dict[int, bool]:
        return {c.socket.fileno(): c.wants_to_write for c in self._connections.values()}

    def close(self) -> None:
        for connection in self._connections.values():
            connection.socket.close()
        self._connections.clear()

    def _progress(self, endpoint: str, connection: _Connection, bytes_max: int) -> int:
        received = 0
        try:
            received = connection.progress(bytes_max)
        except _Broken as error:
            del self._connections[endpoint]
            connection.socket.close()
            self._answers += [
                ReadFailed(handle, str(error), error.lost, error.refused)
                for handle, read in connection.reads.items()
                if read is not None
            ]
        self._answers += connection.answers
        connection.answers = []
        return received
