"""Serves the blocks of one pool over TCP, from threads of the worker that owns a share of it.

Owns a listening socket and one thread per connected reader. It only reads the pool; what it sends
may be overwritten meanwhile, which the generations behind the data tell. Invariant: nobody without
the key gets a byte, and nothing outside the pool is ever sent.
"""

import socket
import struct
import threading
from contextlib import suppress
from typing import Final

from diptych.transfer.pool_memory import PoolMemory
from diptych.transfer.tcp_wire import (
    ANSWER,
    HELLO_S_MAX,
    LAYOUT_BYTES,
    REQUEST,
    SPAN,
    SPANS_MAX,
    receive,
    serve_hello,
)

_PIECES_MAX: Final = 512  # of one sendmsg; the kernel takes 1,024


class BlockServer:
    """Listens on `host`, at a port of the kernel's choice."""

    def __init__(self, host: str, pool: PoolMemory, key: bytes, layout: bytes) -> None:
        assert len(layout) == LAYOUT_BYTES
        self._pool = pool
        self._key = key
        self._layout = layout
        self._listener = socket.create_server((host, 0))
        address, port = self._listener.getsockname()[:2]
        self.endpoint = f"{address}:{port}"
        threading.Thread(target=self._accept, name="blocks", daemon=True).start()

    def close(self) -> None:
        """No new readers; those that are connected end with this process."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError, EOFError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.settimeout(HELLO_S_MAX)
            if not serve_hello(connection, self._key, self._layout):
                return
            connection.settimeout(None)
            while self._answer(connection):
                pass

    def _answer(self, connection: socket.socket) -> bool:
        """One request. False: it asks for what there is not."""
        handle, num_spans = REQUEST.unpack(receive(connection, REQUEST.size))
        if not 0 < num_spans <= SPANS_MAX:
            return False
        spans = list(SPAN.iter_unpack(receive(connection, num_spans * SPAN.size)))
        if any(not count or first + count > self._pool.num_blocks for first, count in spans):
            return False
        num_blocks = sum(count for _, count in spans)
        pieces = [memoryview(ANSWER.pack(handle, num_blocks))]
        pieces += [self._pool.blocks(first, count) for first, count in spans]
        _send(connection, pieces)
        page = self._pool.page  # the kernel has the data: what the page says now is later
        generations = page.generations(
            i for first, count in spans for i in range(first, first + count)
        )
        connection.sendall(struct.pack(f"<{num_blocks}Q", *generations))
        return True


def _send(connection: socket.socket, pieces: list[memoryview]) -> None:
    """Gathered from where they are; nothing is copied in this process."""
    while pieces:
        sent = connection.sendmsg(pieces[:_PIECES_MAX])
        while pieces and sent >= len(pieces[0]):
            sent -= len(pieces[0])
            del pieces[0]
        if sent:
            pieces[0] = pieces[0][sent:]
