"""The two ends of the wire between the head and the agents of other hosts: one CURVE TCP socket.

Own the sockets, the numbering and the sense of silence. Invariants: a send never blocks; a packet
that is missing, malformed or from nobody known ends the link of its sender, never a process.
"""

import logging
from collections.abc import Iterator
from typing import Final

import msgspec
import zmq

from diptych.engine.core.errors import ConfigError
from diptych.server.link_wire import (
    PACKET_BYTES_MAX,
    PACKETS_MAX,
    FromAgent,
    FromHead,
    Hello,
    Packet,
)
from diptych.transfer.network import (
    Gatekeeper,
    Network,
    lock_client,
    lock_server,
    speak_ipv6,
    tcp_endpoint,
)

BEAT_S: Final = 0.2
"""How often each end says that it lives."""
_BATCH_MAX: Final = 1024
_HANGUPS_MAX: Final = 3

_log = logging.getLogger("diptych")
_ENCODER: Final = msgspec.msgpack.Encoder()
_FROM_AGENT: Final = msgspec.msgpack.Decoder(tuple[int, FromAgent])
_FROM_HEAD: Final = msgspec.msgpack.Decoder(tuple[int, FromHead])


class LinkLost(Exception):
    """Something that was sent over the link never came, or never will."""


class HeadLink:
    """The head's end: all agents over one socket, told apart by the name of their link."""

    def __init__(self, network: Network, port: int) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.gate = Gatekeeper(self._context, network.secret)
        self.socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        lock_server(self.socket, network.secret)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self.socket.setsockopt(zmq.SNDHWM, PACKETS_MAX)
        self.socket.setsockopt(zmq.RCVHWM, PACKETS_MAX)
        self.socket.setsockopt(zmq.MAXMSGSIZE, PACKET_BYTES_MAX)
        self._monitor = self.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        endpoint = tcp_endpoint(network.ip, port or "*")
        speak_ipv6(self.socket, endpoint)
        try:
            self.socket.bind(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(f"cannot listen for hosts at {network.ip}:{port}: {error}") from error
        endpoint = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.endpoint = endpoint.removeprefix("tcp://")
        self._heard: dict[bytes, int] = {}  # link -> number of its last packet
        self._said: dict[bytes, int] = {}

    def sockets(self) -> "list[zmq.Socket[bytes]]":
        return [self.socket, self.gate.socket, self._monitor]

    def send(self, link: bytes, packet: Packet) -> bool:
        """False: it is not connected, or does not read any more."""
        number = self._said.get(link, 0) + 1
        try:
            self.socket.send_multipart([link, _ENCODER.encode((number, packet))], zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        self._said[link] = number
        return True

    def receive(self) -> Iterator[tuple[bytes, FromAgent | LinkLost]]:
        """What came; `LinkLost` in the place of a packet that cannot follow the last one."""
        self.gate.answer()
        for _ in range(_BATCH_MAX):
            if not int(self.socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                return
            link, *frames = self.socket.recv_multipart(zmq.NOBLOCK)
            yield link, self._open(link, frames)

    def broke(self) -> bool:
        """Some connection ended since it was asked last."""
        ended = False
        while int(self._monitor.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._monitor.recv_multipart(zmq.NOBLOCK)
            ended = True
        return ended

    def forget(self, link: bytes) -> None:
        self._heard.pop(link, None)
        self._said.pop(link, None)

    def close(self, linger_ms: int = 0) -> None:
        self.socket.disable_monitor()
        self._monitor.close(linger=0)
        self.socket.close(linger=linger_ms)
        self.gate.close()
        self._context.term()

    def _open(self, link: bytes, frames: list[bytes]) -> FromAgent | LinkLost:
        try:
            (frame,) = frames
            number, packet = _FROM_AGENT.decode(frame)
        except (msgspec.MsgspecError, ValueError) as error:
            return LinkLost(f"it sent a malformed packet: {error}")
        if isinstance(packet, Hello) and link not in self._heard:
            self._heard[link] = number
            return packet
        if number != self._heard.get(link, -1) + 1:
            return LinkLost("packets were lost")
        self._heard[link] = number
        return packet


class AgentLink:
    """An agent's end; its name on the wire is its alone."""

    def __init__(self, head: str, secret: str, name: bytes) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        lock_client(self.socket, secret)
        self.socket.setsockopt(zmq.ROUTING_ID, name)
        self.socket.setsockopt(zmq.SNDHWM, PACKETS_MAX)
        self.socket.setsockopt(zmq.RCVHWM, PACKETS_MAX)
        self.socket.setsockopt(zmq.MAXMSGSIZE, PACKET_BYTES_MAX)
        self._monitor = self.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._broke = 0  # connections that ended
        self._said = 0
        self._heard = 0
        speak_ipv6(self.socket, head)
        try:
            self.socket.connect(f"tcp://{head}")
        except zmq.ZMQError as error:
            self.close(0)
            raise ConfigError(f"{head!r} is no address: say HOST:PORT") from error

    @property
    def is_refused(self) -> bool:
        """Somebody listens there, and hangs up on us: the key is not its own."""
        return not self._heard and self._broke >= _HANGUPS_MAX

    def sockets(self) -> "list[zmq.Socket[bytes]]":
        return [self.socket, self._monitor]

    def send(self, packet: Packet) -> None:
        """Raises LinkLost when the head does not read any more."""
        self._said += 1
        try:
            self.socket.send(_ENCODER.encode((self._said, packet)), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            raise LinkLost(str(error)) from error

    def receive(self) -> Iterator[FromHead]:
        """Raises LinkLost after a gap."""
        while int(self._monitor.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._monitor.recv_multipart(zmq.NOBLOCK)
            self._broke += 1
        for _ in range(_BATCH_MAX):
            if not int(self.socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                return
            try:
                number, packet = _FROM_HEAD.decode(self.socket.recv(zmq.NOBLOCK))
            except (msgspec.MsgspecError, ValueError) as error:
                raise LinkLost(f"the head sent a malformed packet: {error}") from error
            self._heard += 1
            if number != self._heard:
                raise LinkLost("packets of the head were lost")
            yield packet

    def close(self, linger_ms: int) -> None:
        self.socket.disable_monitor()
        self._monitor.close(linger=0)
        self.socket.close(linger=linger_ms)
        self._context.term()
