"""What the two ends of a TCP transfer say: who they are, which blocks, and the bytes.

The server sends a nonce; the client answers with HMAC(key, nonce + layout) and the layout; the
server with a verdict. Then requests (handle, spans) and, in their order, answers: header, the
blocks' bytes, the generations that the server read after it had handed the bytes to the kernel.
"""

import hmac
import logging
import os
import socket
import struct
from collections.abc import Sequence
from typing import Final

from diptych.transfer.spans import Span

NONCE_BYTES: Final = 16
MAC_BYTES: Final = 32
LAYOUT_BYTES: Final = 32
ACCEPTED: Final = 1
BAD_KEY: Final = 2
OTHER_LAYOUT: Final = 3
REFUSALS: Final = {BAD_KEY: "the key is wrong", OTHER_LAYOUT: "its blocks have another layout"}
REQUEST: Final = struct.Struct("<QI")  # handle, spans
SPAN: Final = struct.Struct("<II")  # source, count
ANSWER: Final = struct.Struct("<QI")  # handle, blocks
SPANS_MAX: Final = 4096
HELLO_S_MAX: Final = 5.0

_log = logging.getLogger("diptych")


def prove(key: bytes, nonce: bytes, layout: bytes) -> bytes:
    return hmac.digest(key, nonce + layout, "sha256")


def verdict(key: bytes, nonce: bytes, layout: bytes, hello: bytes) -> int:
    """The server's answer to MAC and layout of a client."""
    mac, theirs = hello[:MAC_BYTES], hello[MAC_BYTES:]
    if not hmac.compare_digest(mac, prove(key, nonce, theirs)):
        return BAD_KEY
    return ACCEPTED if theirs == layout else OTHER_LAYOUT


def serve_hello(connection: socket.socket, key: bytes, layout: bytes) -> bool:
    """The server's part of the greeting. False: the client was refused, and knows why."""
    nonce = os.urandom(NONCE_BYTES)
    connection.sendall(nonce)
    answer = verdict(key, nonce, layout, receive(connection, MAC_BYTES + LAYOUT_BYTES))
    connection.sendall(bytes([answer]))
    if answer != ACCEPTED:
        _log.error("refused a reader of blocks: %s", REFUSALS[answer])
    return answer == ACCEPTED


def receive(connection: socket.socket, count: int) -> bytes:
    """Exactly `count` bytes. Raises EOFError."""
    data = bytearray(count)
    view = memoryview(data)
    while view:
        got = connection.recv_into(view)
        if not got:
            raise EOFError("the peer closed the connection")
        view = view[got:]
    return bytes(data)


def encode_request(handle: int, spans: Sequence[Span]) -> bytes:
    pieces = [REQUEST.pack(handle, len(spans))]
    pieces += [SPAN.pack(span.source, span.count) for span in spans]
    return b"".join(pieces)
