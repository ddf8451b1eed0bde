"""Message channels between processes: ZeroMQ over ipc, msgpack, no pickle.

Every process binds one PULL socket named after its incarnation and connects a PUSH socket to each
peer it speaks to. In a cluster it has a second inbox, for other hosts (far.py). Workers also have a
short cut (shortcut.py) for the one message that a client's next token waits for, the seal. Owns the
sockets and the frame codec. Invariants: a send never blocks; every queue is bounded, and a peer
whose queue is full is reported, to be fenced; a frame that does not decode is counted and dropped,
it never ends a process.
"""

import asyncio
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import zmq

from diptych.engine.core.errors import ConfigError
from diptych.engine.core.messages import (
    Address,
    AnyMessage,
    Cut,
    Message,
    Peers,
    Ready,
    Seal,
    Send,
    Stuck,
)
from diptych.engine.core.types import Epoch
from diptych.transfer.far import WATCH_S, FarPeer, FarSide
from diptych.transfer.network import Network
from diptych.transfer.processes import process_name
from diptych.transfer.shortcut import ShortcutInbox, ShortcutPeer

QUEUE_FRAMES_MAX: Final = 16_384
"""Frames waiting for one peer; a peer that lets so many wait is dead."""
FRAME_BYTES_MAX: Final = 256 << 20
BATCH_FRAMES_MAX: Final = 1024
"""Frames taken in one `receive`, so that a flood cannot keep a loop from its other work."""
SOCKET_PATH_MAX: Final = 107  # of the kernel, for unix sockets
SUPERVISOR: Final = Address("supervisor", 0, 1)
"""A supervisor never restarts: its run directory, and all that live in it, end with it."""

_log = logging.getLogger("diptych")


def socket_path(run_dir: Path, address: Address) -> Path:
    return run_dir / f"{process_name(address)}.{address.epoch}"


@dataclass(slots=True)
class ChannelCounts:
    """Since the channels were opened."""

    received: int = 0
    malformed: int = 0
    dropped: int = 0  # sends refused: full queue, oversized frame, or an incarnation that is over


@dataclass(slots=True)
class _Peer:
    """The ways to one incarnation of a peer."""

    epoch: Epoch
    socket: "zmq.Socket[bytes]"
    shortcut: ShortcutPeer | None
    far: FarPeer | None = None  # whose socket it is, if it is on another host

    def close(self) -> None:
        if self.far is not None:
            self.far.close()
        else:
            self.socket.close(linger=0)
        if self.shortcut is not None:
            self.shortcut.close()


class Channels:
    """One process's inbox and its outgoing queues. Not thread safe; `close` when done.

    network: this host's place in a cluster, None where there is one host only.
    """

    def __init__(
        self,
        run_dir: Path,
        me: Address,
        network: Network | None = None,
        *,
        queue_frames: int = QUEUE_FRAMES_MAX,
    ) -> None:
        path = socket_path(run_dir, me)
        if len(str(path)) + 2 > SOCKET_PATH_MAX:
            raise ConfigError(f"the path of a socket is too long, set a shorter TMPDIR: {path}")
        self.me = me
        self.counts = ChannelCounts()
        self._run_dir = run_dir
        self._queue_frames = queue_frames
        self._peers: dict[tuple[str, int], _Peer] = {}
        self._stuck: set[Address] = set()  # reported to the supervisor
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)
        self._context = zmq.Context()
        self.inbox: zmq.Socket[bytes] = self._context.socket(zmq.PULL)
        self.inbox.setsockopt(zmq.LINGER, 0)
        self.inbox.setsockopt(zmq.RCVHWM, queue_frames)
        self.inbox.setsockopt(zmq.MAXMSGSIZE, FRAME_BYTES_MAX)
        self.inbox.bind(f"ipc://{path}")
        self._shortcut = ShortcutInbox(path) if me.kind == "worker" else None
        self._watched: dict[int, bool] = {}
        self._far = None
        if network is not None:
            self._far = FarSide(self._context, network, queue_frames, FRAME_BYTES_MAX)
        self._poller = zmq.Poller()
        self._poller.register(self.inbox, zmq.POLLIN)
        if self._shortcut is not None:
            self._poller.register(self._shortcut.fileno(), zmq.POLLIN)
        if self._far is not None:
            self._poller.register(self._far.inbox, zmq.POLLIN)
            self._poller.register(self._far.gate.socket, zmq.POLLIN)

    @property
    def endpoint(self) -> str:
        """Where other hosts reach this process; "" outside a cluster."""
        return self._far.endpoint if self._far is not None else ""

    def filenos(self) -> list[int]:
        """Readable when frames may have come; edge triggered: `receive` until it returns none."""
        sockets = [self.inbox]
        if self._far is not None:
            sockets += [self._far.inbox, self._far.gate.socket]
        return [int(socket.getsockopt(zmq.FD)) for socket in sockets]

    def watch(self, fds: dict[int, bool]) -> None:
        """`receive` also ends when one of these is readable (True: or writable)."""
        if fds == self._watched:
            return
        for fd in self._watched.keys() - fds.keys():
            self._poller.unregister(fd)
        for fd, write in fds.items():
            self._poller.register(fd, zmq.POLLIN | (zmq.POLLOUT if write else 0))
        self._watched = dict(fds)

    def send(self, send: Send) -> bool:
        """Queues the message. False: the peer is dead or gone, and the message is lost."""
        frame = self._encoder.encode(send.message)
        if len(frame) > FRAME_BYTES_MAX:
            return self._drop(send, "too large")
        peer = self._peer(send.to)
        if peer is None:
            return self._park(send, frame)
        if peer.shortcut is not None and isinstance(send.message, Seal):
            if peer.shortcut.send(frame):
                return True
        try:
            peer.socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            if peer.far is not None:  # or there is no queue any more
                self._report_cut(peer.far)
                return self._drop(send, "its connection broke")
            self._report_stuck(send.to)
            return self._drop(send, "the peer's queue is full")
        return True

    def send_to(self, to: Address, message: Message) -> bool:
        return self.send(Send(to, message))

    def announce(self) -> None:
        """Tells the supervisor that this process listens."""
        self.send_to(SUPERVISOR, Ready(process_name(self.me), self.me.epoch, self.endpoint))

    def receive(self, timeout_s: float | None) -> list[AnyMessage]:
        """Waits for a message (None: for ever), then takes all that wait, at most 1,024."""
        timeout_ms = None if timeout_s is None else math.ceil(timeout_s * 1000)
        messages: list[AnyMessage] = []
        for source, _ in self._poller.poll(timeout_ms):
            if source is self.inbox:
                self._drain_inbox(self.inbox, messages)
            elif self._far is not None and source is self._far.inbox:
                self._drain_inbox(self._far.inbox, messages)
            elif self._far is not None and source is self._far.gate.socket:
                self._far.gate.answer()
            elif source not in self._watched:
                self._drain_shortcut(messages)
        if self._far is not None:
            if self._far.watch_due():
                self._report_cuts()
            messages = [m for m in messages if not self._took_news(m)]
        return messages

    def close(self) -> None:
        for peer in self._peers.values():
            peer.close()
        self._peers.clear()
        if self._shortcut is not None:
            self._shortcut.close()
        self.inbox.close(linger=0)
        if self._far is not None:
            self._far.close()
        self._context.term()
        socket_path(self._run_dir, self.me).unlink(missing_ok=True)

    def _drain_inbox(self, inbox: "zmq.Socket[bytes]", messages: list[AnyMessage]) -> None:
        """Asks before it takes: an exception for an empty queue would cost more than a message."""
        for _ in range(BATCH_FRAMES_MAX):
            if not int(inbox.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                return
            self._decode(inbox.recv(zmq.NOBLOCK), messages)

    def _drain_shortcut(self, messages: list[AnyMessage]) -> None:
        assert self._shortcut is not None
        while (frame := self._shortcut.receive()) is not None:
            self._decode(frame, messages)

    def _decode(self, frame: bytes | memoryview, messages: list[AnyMessage]) -> None:
        self.counts.received += 1
        try:
            messages.append(self._decoder.decode(frame))
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            self.counts.malformed += 1
            _log.error("dropped a malformed frame of %d bytes: %s", len(frame), error)

    def _peer(self, to: Address) -> "_Peer | None":
        """None: this incarnation is over, a newer one is known; or nobody knows yet where it is."""
        known = self._peers.get((to.kind, to.number))
        if known is not None and known.epoch >= to.epoch:
            return known if known.epoch == to.epoch else None
        peer = self._connect(to)
        if peer is not None:
            if known is not None:
                known.close()
            self._peers[to.kind, to.number] = peer
        return peer

    def _connect(self, to: Address) -> "_Peer | None":
        """Over ipc if it listens on this host, which its socket in the run directory shows."""
        inbox = socket_path(self._run_dir, to)
        if self._far is not None and self._far.directory.is_parked(to):
            return None  # what waits goes first
        if self._far is not None and to != SUPERVISOR and not inbox.exists():
            endpoint = self._far.directory.endpoint(to)
            if endpoint is None:
                return None
            far = self._far.connect(to, endpoint)
            return _Peer(to.epoch, far.socket, None, far)
        socket = self._context.socket(zmq.PUSH)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, self._queue_frames)
        socket.setsockopt(zmq.RECONNECT_IVL, 10)  # ms
        socket.connect(f"ipc://{inbox}")
        between_workers = self.me.kind == to.kind == "worker"
        return _Peer(to.epoch, socket, ShortcutPeer(inbox) if between_workers else None)

    def _park(self, send: Send, frame: bytes) -> bool:
        """There is no way to it (yet)."""
        known = self._peers.get((send.to.kind, send.to.number))
        if self._far is None or (known is not None and known.epoch > send.to.epoch):
            return self._drop(send, "its incarnation is over")
        if not self._far.directory.park(send.to, frame):
            self._report_stuck(send.to)
            return self._drop(send, "too much waits until it is known where it is")
        return True

    def _took_news(self, message: AnyMessage) -> bool:
        """News about other hosts are for the channels themselves."""
        if not isinstance(message, Peers):
            return False
        assert self._far is not None
        for address in message.down:
            known = self._peers.get((address.kind, address.number))
            if known is not None and known.epoch == address.epoch and known.far is not None:
                del self._peers[address.kind, address.number]
                known.close()
        for address, frames in self._far.directory.update(message):
            peer = self._peer(address)
            if peer is not None:
                for frame in frames:  # fewer than a queue holds
                    peer.socket.send(frame, zmq.NOBLOCK)
        return True

    def _report_cuts(self) -> None:
        for peer in list(self._peers.values()):
            if peer.far is not None and peer.far.broke():
                self._report_cut(peer.far)

    def _report_cut(self, far: FarPeer) -> None:
        """Once."""
        if not far.cut:
            far.cut = True
            self.send_to(SUPERVISOR, Cut(self.me, far.address))
            name = f"{process_name(far.address)}.{far.address.epoch}"
            _log.info("the connection to %s broke", name)

    def _report_stuck(self, peer: Address) -> None:
        """Once per incarnation: only its end makes good what it has missed."""
        if peer.kind != "supervisor" and peer not in self._stuck:
            self._stuck.add(peer)
            self.send_to(SUPERVISOR, Stuck(peer))

    def _drop(self, send: Send, reason: str) -> bool:
        self.counts.dropped += 1
        if self.counts.dropped.bit_count() == 1:  # the 1st, 2nd, 4th ...: a log that cannot flood
            kind = type(send.message).__name__
            to = f"{process_name(send.to)}.{send.to.epoch}"
            _log.warning("%s to %s lost, %s (%d so far)", kind, to, reason, self.counts.dropped)
        return False


class AsyncChannels:
    """The same for an asyncio event loop: messages are given to `on_message`, in order.

    Made and closed inside the running loop. An exception of `on_message` reaches the loop's
    exception handler.
    """

    def __init__(
        self,
        run_dir: Path,
        me: Address,
        on_message: Callable[[AnyMessage], None],
        network: Network | None = None,
    ) -> None:
        self.channels = Channels(run_dir, me, network)
        self._on_message = on_message
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._filenos = self.channels.filenos()
        for fd in self._filenos:
            self._loop.add_reader(fd, self._readable)
        self._loop.call_soon(self._readable)  # what came before the reader was there
        if network is not None:
            self._loop.call_later(WATCH_S, self._watch)

    def send(self, send: Send) -> bool:
        return self.channels.send(send)

    def announce(self) -> None:
        self.channels.announce()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            for fd in self._filenos:
                self._loop.remove_reader(fd)
            self.channels.close()

    def _watch(self) -> None:
        """Broken connections are looked for also while nothing comes."""
        if not self._closed:
            self._readable()
            self._loop.call_later(WATCH_S, self._watch)

    def _readable(self) -> None:
        if self._closed:
            return
        messages = self.channels.receive(0)
        if messages:  # the descriptor tells of an edge once: come back until nothing is left
            self._loop.call_soon(self._readable)
        for message in messages:
            if not self._closed:
                self._on_message(message)
