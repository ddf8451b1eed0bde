"""The part of a process's channels that leaves its host: CURVE over TCP, and who listens where.

Owns the directory (address -> endpoint), the messages that wait for an entry of it, and the
connections. Invariants: what waits is bounded; a connection that broke is never made again, since
nobody knows what was lost with it: it is reported as `Cut`, once, and the supervisor decides.
"""

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Final

import zmq
from zmq.utils.monitor import recv_monitor_message

from diptych.engine.core.messages import Address, Peers
from diptych.transfer.network import (
    Gatekeeper,
    Network,
    lock_client,
    lock_server,
    speak_ipv6,
    tcp_endpoint,
)

PARKED_FRAMES_MAX: Final = 1024
"""Frames that wait until one peer's endpoint is known."""
PARKED_PEERS_MAX: Final = 256
WATCH_S: Final = 0.25
"""How often broken connections are looked for."""
_BROKEN: Final = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


class FarPeer:
    """A connection to a process of another host."""

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        network: Network,
        address: Address,
        endpoint: str,
        queue_frames: int,
    ) -> None:
        self.address = address
        self.cut = False  # reported
        self.socket: zmq.Socket[bytes] = context.socket(zmq.PUSH)
        lock_client(self.socket, network.secret)
        self.socket.setsockopt(zmq.SNDHWM, queue_frames)
        self.socket.setsockopt(zmq.RECONNECT_IVL, -1)
        self._monitor = self.socket.get_monitor_socket(_BROKEN)
        speak_ipv6(self.socket, endpoint)
        self.socket.connect(endpoint)

    def broke(self) -> bool:
        """The connection is over."""
        if not int(self._monitor.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            return False
        recv_monitor_message(self._monitor)
        return True

    def close(self) -> None:
        self.socket.disable_monitor()
        self._monitor.close(linger=0)
        self.socket.close(linger=0)


@dataclass(slots=True)
class Directory:
    """Who listens where on other hosts, and what waits to be sent there."""

    _endpoints: dict[Address, str] = field(default_factory=dict)
    _parked: dict[Address, deque[bytes]] = field(default_factory=dict)

    def endpoint(self, address: Address) -> str | None:
        return self._endpoints.get(address)

    def park(self, to: Address, frame: bytes) -> bool:
        """False: too much waits already."""
        frames = self._parked.get(to)
        if frames is None:
            if len(self._parked) >= PARKED_PEERS_MAX:
                return False
            frames = self._parked[to] = deque()
        if len(frames) >= PARKED_FRAMES_MAX:
            return False
        frames.append(frame)
        return True

    def is_parked(self, to: Address) -> bool:
        return to in self._parked

    def update(self, news: Peers) -> list[tuple[Address, deque[bytes]]]:
        """What waited for those that are up now."""
        for address in news.down:
            self._endpoints.pop(address, None)
            self._parked.pop(address, None)
        for address, endpoint in news.up:
            self._endpoints[address] = endpoint
        return [(a, self._parked.pop(a)) for a, _ in news.up if a in self._parked]


class FarSide:
    """Of one process: an inbox for other hosts, the gate before it, and the directory."""

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        network: Network,
        queue_frames: int,
        frame_bytes_max: int,
    ) -> None:
        self._network = network
        self._context = context
        self._queue_frames = queue_frames
        self.directory = Directory()
        self.gate = Gatekeeper(context, network.secret)
        self.inbox: zmq.Socket[bytes] = context.socket(zmq.PULL)
        lock_server(self.inbox, network.secret)
        self.inbox.setsockopt(zmq.RCVHWM, queue_frames)
        self.inbox.setsockopt(zmq.MAXMSGSIZE, frame_bytes_max)
        endpoint = tcp_endpoint(network.ip, "*")
        speak_ipv6(self.inbox, endpoint)
        self.inbox.bind(endpoint)
        self.endpoint = self.inbox.getsockopt_string(zmq.LAST_ENDPOINT)
        self._watched_at_s = 0.0

    def connect(self, to: Address, endpoint: str) -> FarPeer:
        return FarPeer(self._context, self._network, to, endpoint, self._queue_frames)

    def watch_due(self) -> bool:
        """Whether it is time to look for broken connections."""
        now = time.monotonic()
        if now - self._watched_at_s < WATCH_S:
            return False
        self._watched_at_s = now
        return True

    def close(self) -> None:
        self.inbox.close(linger=0)
        self.gate.close()
