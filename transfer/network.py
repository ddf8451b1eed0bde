"""What a process needs to speak to other hosts: its address and the key of the launch; CURVE.

Owns how a ZeroMQ socket is locked. One CURVE key pair is shared by all processes of a launch: who
has its secret half is a member, both ways. Invariant: a socket that is locked here gives nothing
to, and takes nothing from, anyone without the key.
"""

from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from hmac import digest
from typing import Final

import msgspec
import zmq
from zmq.utils import z85

from diptych.engine.core.errors import ConfigError

TCP_RETRY_MS_MAX: Final = 5000
"""Unacknowledged for so long, a connection is given up: longer than any host may be silent."""
HANDSHAKE_MS_MAX: Final = 20_000
_DOMAIN: Final = b"diptych"
_GATE: Final = "inproc://zeromq.zap.01"  # where libzmq asks (RFC 27)
_REQUESTS_MAX: Final = 64  # answered in one go


class Network(msgspec.Struct, frozen=True):
    """A host's place in a cluster."""

    ip: str  # other hosts reach it there; nothing listens elsewhere
    secret: str  # CURVE secret key of the launch, Z85


def new_secret() -> str:
    return str(zmq.curve_keypair()[1].decode())


@cache
def public_of(secret: str) -> bytes:
    """Raises ConfigError when it is no key."""
    try:
        return bytes(zmq.curve_public(secret.encode()))
    except (ValueError, UnicodeError, zmq.ZMQError) as error:
        raise ConfigError("the cluster's key is not a CURVE key of 40 characters") from error


def derived_key(secret: str, purpose: str) -> str:
    """A key for something else than CURVE, hex."""
    return digest(secret.encode(), purpose.encode(), sha256).hex()


def tcp_endpoint(ip: str, port: int | str) -> str:
    return f"tcp://[{ip}]:{port}" if ":" in ip else f"tcp://{ip}:{port}"


def speak_ipv6(socket: "zmq.Socket[bytes]", endpoint: str) -> None:
    """Only where it is asked for: else addresses would be written as mapped ones."""
    if "[" in endpoint:
        socket.setsockopt(zmq.IPV6, 1)


def lock_server(socket: "zmq.Socket[bytes]", secret: str) -> None:
    """To be called before `bind`; its context needs a `Gatekeeper`."""
    socket.curve_secretkey = secret.encode()
    socket.curve_publickey = public_of(secret)
    socket.curve_server = True
    socket.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN)
    _prepare(socket)


def lock_client(socket: "zmq.Socket[bytes]", secret: str) -> None:
    """To be called before `connect`."""
    socket.curve_secretkey = secret.encode()
    socket.curve_publickey = public_of(secret)
    socket.curve_serverkey = public_of(secret)
    _prepare(socket)


def _prepare(socket: "zmq.Socket[bytes]") -> None:
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.TCP_MAXRT, TCP_RETRY_MS_MAX)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS_MAX)


class Gatekeeper:
    """Answers libzmq's question who may come in: those with the launch's key.

    Without threads: its owner polls `socket` beside its own and calls `answer`. It must exist
    before a locked server of the same context binds.
    """

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", secret: str) -> None:
        self._members = public_of(secret)
        self.refused = 0
        self.socket: zmq.Socket[bytes] = context.socket(zmq.REP)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(_GATE)

    def answer(self) -> None:
        for _ in range(_REQUESTS_MAX):
            if not int(self.socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                return
            self.socket.send_multipart(self._verdict(self.socket.recv_multipart()))

    def close(self) -> None:
        self.socket.close(linger=0)

    def _verdict(self, frames: Sequence[bytes]) -> list[bytes]:
        version, request = frames[:2]
        mechanism, credentials = frames[5], frames[6:]
        known = mechanism == b"CURVE" and z85.encode(credentials[0]) == self._members
        self.refused += not known
        verdict = (b"200", b"OK") if known else (b"400", b"unknown key")
        return [version, request, *verdict, b"member" if known else b"", b""]
